"""The report's page, a Jinja template, and its parts; Python because Flower bundles carry no HTML files."""
# ruff: noqa: RUF001 - typographic dashes and Greek letters of the page

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Tile:
    """One number at the top of the page."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Card:
    """One chart of the page."""

    title: str
    body: Markup
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the page: column names, rows of cells as text, and which columns are numbers."""

    columns: list[str]
    rows: list[list[str]]
    numeric: frozenset[int] = frozenset()
    more: int = 0
    """Rows left out."""


TEMPLATE = r"""{% macro rows_of(table) %}
<div class="scroll"><table>
<tr>{% for name in table.columns %}<th{% if loop.index0 in table.numeric %} class="n"{% endif %}>{{ name }}</th>
{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td{% if loop.index0 in table.numeric %} class="n"
{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% if table.more %}<p class="soft">and {{ table.more }} more in report.json</p>{% endif %}
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }} · Espalier</title>
<style>
:root{--bg:#fbfbf9;--card:#fff;--ink:#1c2420;--soft:#5d6a63;--line:#e4e7e2;--good:#2e7d4f;--bad:#b3392f;
--warn:#a8690c;
--c0:#2f7d57;--c1:#d9822b;--c2:#3b6fb6;--c3:#b5477e;--c4:#7a5cb8;--c5:#2a9aa0;--c6:#b8a12c;--c7:#8a5a3c;--c8:#6b7f8c;
--c9:#d1605e}
@media(prefers-color-scheme:dark){:root{--bg:#131714;--card:#1b211d;--ink:#e7ece8;--soft:#9aa8a0;--line:#2c352f;
--good:#6cc492;
--bad:#ef8479;--warn:#e5ae55;--c0:#62bd8f;--c1:#eaa45b;--c2:#7ba8e6;--c3:#de82b0;--c4:#aa91e0;--c5:#5dc4ca;
--c6:#d9c65c;--c7:#c08e6c;--c8:#9db0bc;--c9:#ee918f}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,Ubuntu,sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}
header{display:flex;flex-wrap:wrap;align-items:baseline;gap:6px 14px;margin-bottom:4px}
h1{font-size:1.75rem;letter-spacing:-.02em;margin:0}
h2{font-size:1.05rem;margin:0 0 2px}
p{margin:0}.soft{color:var(--soft);font-size:.9rem}
code,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.86em;overflow-wrap:anywhere}
.badge{font-size:.8rem;font-weight:600;padding:1px 10px;border-radius:99px;border:1px solid currentColor}
.finished{color:var(--good)}.failed{color:var(--bad)}.stopped,.running{color:var(--warn)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(134px,1fr));gap:12px;margin:22px 0}
.card,.tile{background:var(--card);border:1px solid var(--line);border-radius:12px}
.tile{padding:11px 13px;display:flex;flex-direction:column;justify-content:space-between}.tile b{font-size:1.4rem;
letter-spacing:-.02em;line-height:1.3;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.8rem;line-height:1.35}
.cards{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px}
.card{padding:16px 18px;min-width:0}.wide{grid-column:1/-1}
.card>.soft{margin-bottom:8px}
@media(max-width:760px){.cards{grid-template-columns:minmax(0,1fr)}main{padding:18px 12px 40px}.card{padding:14px 12px}}
svg{display:block;width:100%;height:auto;margin-top:8px;font-family:inherit}
svg text{fill:var(--ink);font-size:13px}svg .tick,svg .label,svg .note{fill:var(--soft)}
.grid{stroke:var(--line)}.event{stroke:var(--soft);stroke-dasharray:2 3}
.curve{fill:none;stroke-width:2;stroke-linejoin:round}.curve.dashed{stroke-dasharray:6 5;stroke-width:1.6}
.curve.dotted{stroke-dasharray:1 4;stroke-linecap:round;stroke-width:1.8}.ghost{opacity:0}
.legend{display:flex;flex-wrap:wrap;gap:3px 16px;margin-top:8px;font-size:.84rem;color:var(--soft)}
.key i{display:inline-block;width:16px;margin-right:6px;vertical-align:middle;border-top:3px solid var(--k)}
.key i.dashed,.key i.dotted{border-top-style:dashed;border-top-width:2px}.key i.dotted{border-top-style:dotted}
.key i.block{width:11px;height:11px;border:0;border-radius:3px;background:var(--k)}
.samples{display:grid;grid-template-columns:minmax(0,2fr) minmax(0,3fr);gap:18px;align-items:start;margin-top:10px}
.strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(118px,1fr));gap:10px}
@media(max-width:760px){.samples{grid-template-columns:minmax(0,1fr)}
.strip{grid-template-columns:repeat(auto-fill,minmax(92px,1fr))}}
figure{margin:0}figure img{display:block;width:100%;border-radius:6px;image-rendering:pixelated;
border:1px solid var(--line)}
figcaption{color:var(--soft);font-size:.8rem;margin-top:3px}
.scroll{overflow-x:auto;margin-top:8px}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:500;white-space:nowrap}tr:last-child td{border-bottom:0}
td.n,th.n{text-align:right}td:first-child{white-space:nowrap}
details{margin-top:4px}summary{cursor:pointer;color:var(--soft);font-size:.9rem}
.columns{columns:3 260px;column-gap:28px;margin-top:10px}
.columns div{display:flex;justify-content:space-between;gap:12px;border-bottom:1px solid var(--line);padding:3px 0;
break-inside:avoid}
.changed{font-weight:600}
footer{margin-top:26px;color:var(--soft);font-size:.84rem}
</style>
</head>
<body>
<main>
<header>
<h1>{{ title }}</h1>
<span class="badge {{ record.status }}">{{ record.status }}</span>
<span class="soft mono">{{ record.run }}</span>
</header>
<p class="soft">{{ subtitle }}</p>
{% if record.reason %}<p class="{{ record.status }}">{{ record.reason }}</p>{% endif %}

<section class="tiles">
{% for tile in tiles %}<div class="tile"><span>{{ tile.name }}</span><b>{{ tile.value }}</b>
<span>{{ tile.note }}</span></div>
{% endfor %}</section>

<div class="cards">
{% if samples %}
<section class="card wide">
<h2>Samples</h2>
<p class="soft">{{ samples_note }}</p>
<div class="samples">
<figure><img src="{{ samples[-1].data }}" alt="samples after window {{ samples[-1].window }}">
<figcaption>window {{ samples[-1].window }}, the newest</figcaption></figure>
{% if samples|length > 1 %}<div class="strip">
{% for picture in samples[:-1] %}<figure>
<img src="{{ picture.data }}" alt="samples after window {{ picture.window }}">
<figcaption>window {{ picture.window }}</figcaption></figure>
{% endfor %}</div>{% endif %}
</div>
</section>
{% endif %}

{% for card in cards %}
<section class="card">
<h2>{{ card.title }}</h2>
{% if card.note %}<p class="soft">{{ card.note }}</p>{% endif %}
{{ card.body }}
</section>
{% endfor %}

<section class="card wide">
<h2>Windows</h2>
<div class="scroll"><table>
<tr><th class="n">window</th><th>rounds</th><th class="n">last loss</th>
{% if classified %}<th class="n">accuracy</th>{% endif %}<th class="n">clients</th>
{% for edge in edges %}<th class="n">ρ {{ edge }}</th><th class="n">μ {{ edge }}</th>{% endfor %}
<th class="n">client–edge</th><th class="n">edge–cloud</th><th class="n">seconds</th></tr>
{% for row in windows %}<tr><td class="n">{{ row.window }}</td><td>{{ row.rounds }}</td>
<td class="n">{{ row.loss }}</td>{% if classified %}<td class="n">{{ row.accuracy }}</td>{% endif %}
<td class="n">{{ row.clients }}</td>
{% for cell in row.edges %}<td class="n">{{ cell }}</td>{% endfor %}
<td class="n">{{ row.client_edge }}</td><td class="n">{{ row.edge_cloud }}</td>
<td class="n">{{ row.seconds }}</td></tr>
{% endfor %}</table></div>
</section>

{% if augmentation.rows %}
<section class="card wide">
<h2>Augmentation (FAug)</h2>
<p class="soft">{{ augmentation_note }}</p>
<div{% if augmentation_picture %} class="samples"{% endif %}>
{% if augmentation_picture %}<figure><img src="{{ augmentation_picture }}" alt="images of the shared generator">
<figcaption>images of the shared generator, eight a class</figcaption></figure>{% endif %}
<div>{{ rows_of(augmentation) }}</div>
</div>
</section>
{% endif %}

{% if clients.rows %}
<section class="card wide">
<h2>Clients</h2>
{{ rows_of(clients) }}
</section>
{% endif %}

<section class="card wide">
<h2>Faults</h2>
{% if faults %}
<p class="soft">What went wrong and the run went on without.</p>
<div class="scroll"><table>
<tr><th class="n">window</th><th class="n">round</th><th>who</th><th>kind</th><th>seen at</th><th>detail</th></tr>
{% for fault in faults %}<tr><td class="n">{{ fault.window }}</td><td class="n">{{ fault.round }}</td>
<td>{{ fault.node }}</td><td>{{ fault.kind }}</td><td>{{ fault.tier }}</td><td>{{ fault.detail }}</td></tr>
{% endfor %}</table></div>
{% if more_faults %}<p class="soft">and {{ more_faults }} more in report.json</p>{% endif %}
{% else %}<p class="soft">None.</p>{% endif %}
</section>

<section class="card wide">
<h2>Configuration</h2>
<p class="soft">What differs from the defaults is bold.</p>
<details><summary>{{ settings|length }} settings</summary>
<div class="columns">
{% for setting in settings %}<div class="{{ 'changed' if setting.changed }}"><span>{{ setting.key }}</span>
<span class="mono">{{ setting.value }}</span></div>
{% endfor %}</div></details>
</section>
</div>
<footer>Espalier {{ record.espalier }} · the numbers are in report.json beside this page</footer>
</main>
</body>
</html>
"""
