# allstep and its launcher in an image: multi-stage, so that the build tools stay behind; runs as a user without rights.
#
#   docker build -t allstep .
#   docker run --rm allstep run --nproc 2 examples/digits.py
#
# BASE_IMAGE is any Debian or Ubuntu image with or without CUDA; python3 of 3.11 or newer is installed from it.
# TORCH is the requirement given to pip, for another version of torch; PIP_OPTIONS are options to pip, such as
# --index-url for another build of it (the index of CPU builds spares gigabytes where there is no GPU).
ARG BASE_IMAGE=docker.io/library/debian:bookworm-slim

FROM ${BASE_IMAGE} AS build
# The base image decides the versions of Debian's packages.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/allstep
ENV PATH=/opt/allstep/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
ARG TORCH=torch
ARG PIP_OPTIONS=
# hadolint ignore=SC2086
RUN pip install --no-cache-dir ${PIP_OPTIONS} -c constraints.txt "${TORCH}"
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
# hadolint ignore=SC2086
RUN pip install --no-cache-dir ${PIP_OPTIONS} -c constraints.txt ".[examples,tensorboard]"

FROM ${BASE_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 allstep
COPY --from=build /opt/allstep /opt/allstep
COPY --chown=allstep:allstep examples /home/allstep/examples
COPY --chown=allstep:allstep configs /home/allstep/configs
ENV PATH=/opt/allstep/bin:$PATH PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/allstep
ENTRYPOINT ["allstep"]
CMD ["--help"]
