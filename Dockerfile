# allstep and its launcher in an image: multi-stage, so that the build tools stay behind; runs as a user without rights.
#
#   docker build -t allstep .
#   docker run --rm --shm-size 1g allstep run --nproc 2 examples/digits.py
#
# BASE_IMAGE is an image of Debian 12, Ubuntu 24.04 or newer, with or without CUDA: python3 of 3.11 or newer is installed
# from it. docs/howto/containers.md says when a CUDA base is needed.
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
# The user's number is not 1000, which Ubuntu's images have given away. Its group is 0, since a container that is started
# with any other number is in that group: so both can write at home.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --no-log-init --create-home --uid 10001 --gid 0 allstep \
    && chmod 775 /home/allstep
COPY --from=build /opt/allstep /opt/allstep
COPY --chown=10001:0 examples /home/allstep/examples
COPY --chown=10001:0 configs /home/allstep/configs
# HOME and USER for a number without an entry in /etc/passwd, for which torch.compile could not name its cache.
ENV PATH=/opt/allstep/bin:$PATH HOME=/home/allstep USER=allstep PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/allstep
ENTRYPOINT ["allstep"]
CMD ["--help"]
