# What docker/check.py measures the image against: torch, diffusers and flwr alone, installed the same way.
ARG BASE=debian:bookworm-slim
ARG BUILDER=${BASE}

# Apart, so that the packages' layer is kept as long as these three stay the same.
FROM ${BASE} AS wanted
COPY constraints.txt /
RUN grep -E '^torch==' /constraints.txt > /first.txt \
    && grep -E '^(diffusers|flwr)==' /constraints.txt > /rest.txt

FROM ${BUILDER} AS packages
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv
RUN python3 -m venv /opt/tools \
    && /opt/tools/bin/pip install --no-cache-dir --quiet --upgrade pip \
    && python3 -m venv --without-pip /opt/bare
COPY --from=wanted /first.txt /rest.txt /
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_PYTHON=/opt/bare/bin/python PIP_PROGRESS_BAR=off
RUN /opt/tools/bin/pip install -r /first.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
    && /opt/tools/bin/pip install -r /rest.txt

FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log /var/log/apt
COPY --from=packages /opt/bare /opt/bare
