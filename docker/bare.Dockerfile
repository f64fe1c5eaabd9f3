# The image that docker/check.py compares with: torch, diffusers and flwr alone, in the same versions, installed the same way.
ARG BASE=debian:bookworm-slim
ARG BUILDER=${BASE}

# A stage of its own: the layer of the packages stays cached as long as the constraints do not change.
FROM ${BASE} AS wanted
COPY constraints.txt /
RUN grep -E '^torch==' /constraints.txt > /first.txt \
    && grep -E '^(diffusers|flwr)==' /constraints.txt > /rest.txt

FROM ${BUILDER} AS packages
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv
RUN python3 -m venv /opt/tools \
    && /opt/tools/bin/pip install --no-cache-dir --quiet --upgrade pip \
    && python3 -m venv --without-pip /opt/bare
COPY --from=wanted /constraints.txt /first.txt /rest.txt /
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_PYTHON=/opt/bare/bin/python PIP_PROGRESS_BAR=off
RUN if [ -n "$TORCH_INDEX" ]; then set -- --index-url "$TORCH_INDEX"; else set -- -c /constraints.txt; fi \
    && /opt/tools/bin/pip install -r /first.txt "$@" \
    && /opt/tools/bin/pip install -r /rest.txt -c /constraints.txt

FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log /var/log/apt
COPY --from=packages /opt/bare /opt/bare
