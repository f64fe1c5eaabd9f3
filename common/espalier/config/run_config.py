"""The run's configuration: one model, validated at the cloud and by whoever receives it in a plan."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

from google.protobuf.struct_pb2 import Struct
from pydantic import ValidationError, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from espalier.config.settings import Settings
from espalier.config.timeouts import chains, order_faults
from espalier.errors import ConfigError
from espalier.models.presets import MODELS
from espalier.names import NAME_RULE, is_name

DEFAULTS = "defaults"
"""Key of a plan's settings that holds the fingerprint of the sender's defaults."""

FlatValue = bool | int | float | str
"""What a Flower run configuration can hold."""

CLOUD_ONLY = frozenset({"out", "eval-data", "shared-data", "generator"})
"""Settings that name places on the cloud's machine; they never leave it in a plan."""


class RunConfig(Settings):
    """The run's configuration: every setting of :class:`Settings`, checked one against another."""

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        from espalier.methods.registry import method_names  # the registry's methods import this module

        names = sorted(method_names())
        if value not in names:
            raise _fault(_not_among(value, names))
        return value

    @field_validator("model")
    @classmethod
    def _known_model(cls, value: str) -> str:
        if value not in MODELS:
            raise _fault(_not_among(value, MODELS))
        return value

    @field_validator("pruning_ratio")
    @classmethod
    def _ratio(cls, value: float) -> float:
        if not 0 <= value < 1:
            raise _fault(
                f"{_show(value)} is out of range; give 0 (no pruning) or a number in (0, 1), e.g. 0.2"
            )
        return value

    @field_validator("levels")
    @classmethod
    def _levels(cls, value: str) -> str:
        from espalier.methods.levels import parse_levels

        try:
            parse_levels(value)
        except ConfigError as error:
            raise _fault(str(error).removeprefix("levels: ")) from None
        return value

    @field_validator("run_id")
    @classmethod
    def _name(cls, value: str) -> str:
        if value and not is_name(value):
            raise _fault(f"{_show(value)} is no name; use {NAME_RULE}")
        return value

    @property
    def prune_round(self) -> int:
        """R_s: `prune-at`, or a third of the rounds where it is left open."""
        return self.prune_at or max(1, round(self.rounds / 3))

    @property
    def windows(self) -> int:
        """Number of windows: `rounds` / `rg`, the last one may be shorter."""
        return math.ceil(self.rounds / self.rg)

    @property
    def dp_sgd(self) -> bool:
        """Whether clients train with DP-SGD."""
        return self.dp_sgd_noise > 0 or self.dp_sgd_epsilon > 0

    @property
    def private(self) -> bool:
        """Whether what clients learn leaves them under differential privacy; label counts are apart."""
        return self.dp_sgd or self.update_noise > 0

    @property
    def cloud_device(self) -> str:
        """Where the cloud computes: `device`, and for the same bits again the CPU."""
        return "cpu" if self.reproducible else self.device

    @classmethod
    def from_flat(cls, mapping: Mapping[str, Any]) -> RunConfig:
        """Validate flat kebab-case settings; absent ones take their defaults.

        Raises
        ------
        ConfigError
            With one line per fault: which key, what is wrong with it, how to mend it.
        """
        keys = flat_keys()
        faults: list[str] = []
        known: dict[str, Any] = {}
        for key, value in mapping.items():
            if key in keys:
                known[keys[key]] = value
            else:
                faults.append(f"{key}: unknown setting{_closest(key, keys)}")
        try:
            config = cls(**known)
        except ValidationError as error:
            faults += [_explain(detail) for detail in error.errors(include_url=False)]
        else:
            faults += _contradictions(config)
        if faults:
            raise ConfigError("\n  ".join([f"run configuration, {len(faults)} fault(s):", *faults]))
        return config

    def to_flat(self) -> dict[str, FlatValue]:
        """Return every setting under its flat kebab-case key."""
        return {name.replace("_", "-"): value for name, value in self.model_dump().items()}

    def to_struct(self) -> Struct:
        """Return the settings as a protobuf Struct for a plan, without those of `CLOUD_ONLY`.

        Only what departs from the defaults is said, with a fingerprint of these: a plan goes to every client in
        every round, and where a client sends a few hundred bytes its settings must not weigh thousands.
        """
        defaults = type(self)().to_flat()
        struct = Struct()
        struct.update(
            {k: v for k, v in self.to_flat().items() if k not in CLOUD_ONLY and v != defaults[k]}
            | {DEFAULTS: _fingerprint(defaults)}
        )
        return struct

    @classmethod
    def from_struct(cls, struct: Struct) -> RunConfig:
        """Validate the settings of a received plan; raises ConfigError like `from_flat`.

        Raises
        ------
        ConfigError
            Also if the sender's defaults are not this side's.
        """
        said = dict(struct.items())
        fingerprint = said.pop(DEFAULTS, None)
        if fingerprint is not None and fingerprint != _fingerprint(cls().to_flat()):
            raise ConfigError(
                "the sender's default settings are not this side's; install the same version of espalier-fl on both"
            )
        return cls.from_flat(said)


def _fingerprint(defaults: Mapping[str, FlatValue]) -> str:
    return hashlib.sha256(json.dumps(defaults, sort_keys=True).encode()).hexdigest()[:16]


def _fault(text: str) -> PydanticCustomError:
    return PydanticCustomError("espalier", "{fault}", {"fault": text})


def flat_keys() -> dict[str, str]:
    """Map each flat kebab-case key to its field name, in the order of the fields."""
    return {name.replace("_", "-"): name for name in RunConfig.model_fields}


def parse_assignments(assignments: Iterable[str]) -> dict[str, FlatValue]:
    """Read ``key=value`` words of the command line; the last one of a key wins.

    A value is TOML (``5``, ``1e-4``, ``true``, ``"text"``); what is no TOML is taken as bare text.

    Raises
    ------
    ConfigError
        A word without ``=``, without a key, or with a list, table or date as its value.
    """
    parsed: dict[str, FlatValue] = {}
    for word in assignments:
        key, equals, text = word.partition("=")
        key, text = key.strip(), text.strip()
        if not equals or not key:
            raise ConfigError(f"-c {word!r} is no setting; write it as -c key=value, e.g. -c rounds=20")
        value = _toml_value(text)
        if not isinstance(value, FlatValue):
            raise ConfigError(f"-c {word!r}: a setting is a number, true, false or a text, not {text}")
        parsed[key] = value
    return parsed


def _toml_value(text: str) -> object:
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if len(table) == 1 else text


def _contradictions(config: RunConfig) -> list[str]:
    """Faults that no single setting has, the method's own included."""
    from espalier.methods.compatibility import contradictions  # methods import this module
    from espalier.methods.registry import METHODS

    faults = contradictions(METHODS[config.method], config)
    faults += order_faults(chains(config.round_deadline, config.window_deadline, config.rg))
    if config.beta_start > config.beta_end:
        faults.append(
            f"beta-start: {config.beta_start} is above beta-end ({config.beta_end}); betas rise to beta-end"
        )
    if config.sample_steps > config.timesteps:
        faults.append(
            f"sample-steps: {config.sample_steps} is more than timesteps ({config.timesteps}); "
            f"set it to at most {config.timesteps}"
        )
    return faults


def _explain(detail: ErrorDetails) -> str:
    """One line for one fault that pydantic found."""
    name = str(detail["loc"][0]) if detail["loc"] else ""
    key = name.replace("_", "-")
    value, kind, context = detail["input"], detail["type"], detail.get("ctx", {})
    if kind == "espalier":
        return f"{key}: {detail['msg']}"
    if kind == "literal_error":
        return f"{key}: {_not_among(value, get_args(RunConfig.model_fields[name].annotation))}"
    if kind == "string_pattern_mismatch":
        return f"{key}: {_show(value)} is not understood; use auto, cpu, mps, cuda or cuda:N"
    if kind == "string_too_short":
        return f"{key}: is empty; give a name, e.g. {key}={_example(name)}"
    bounds = {"greater_than": "above", "greater_than_equal": "at least", "less_than": "below"}
    bounds["less_than_equal"] = "at most"
    if kind in bounds:
        limit = next(context[short] for short in ("gt", "ge", "lt", "le") if short in context)
        return f"{key}: {_show(value)} is out of range; it must be {bounds[kind]} {limit:.16g}"
    if kind == "finite_number":
        return f"{key}: {value} is not a finite number; give one, e.g. {key}={_example(name)}"
    wanted = f"{_expected(name)} is expected, e.g. {key}={_example(name)}"
    return f"{key}: {_show(value)} is {_kind(value)}; {wanted}"


def _expected(name: str) -> str:
    annotation = RunConfig.model_fields[name].annotation
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(get_args(annotation))
    words: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number"}
    return words.get(annotation, "a text")


def _example(name: str) -> str:
    default = RunConfig.model_fields[name].default
    return str(default).lower() if isinstance(default, bool) else _show(default)


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int):
        return "a whole number"
    if isinstance(value, float):
        return "a number with a fraction"
    return "a text" if isinstance(value, str) else f"a {type(value).__name__}"


def _show(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return str(value).lower() if isinstance(value, bool) else str(value)


def _not_among(value: object, names: Iterable[str]) -> str:
    names = list(names)
    return f"{_show(value)} is none of {', '.join(names)}{_closest(str(value), names)}"


def _closest(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.lower().replace("_", "-"), list(words), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""
