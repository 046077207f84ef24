# deepsc_jax in a container: `docker build -t deepsc_jax .` for CPUs,
# `docker build -t deepsc_jax --build-arg EXTRA=cuda13 .` for NVIDIA GPUs. EXTRA names extras of
# pyproject.toml, with commas between them.
#
# Pin the base by digest where builds must be repeatable: --build-arg BASE=python:3.12-slim@sha256:...
ARG BASE=python:3.12-slim-bookworm

# Built in one stage and used in another, so that the image holds no compiler, source or cache.
FROM ${BASE} AS build
ARG EXTRA=""
RUN python -m venv /opt/deepsc
ENV PATH=/opt/deepsc/bin:$PATH
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY deepsc_jax ./deepsc_jax
COPY configs ./configs
# Versions are within the ranges of pyproject.toml.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".${EXTRA:+[$EXTRA]}"

FROM ${BASE}
# Training runs as a user who owns nothing but its home, where what XLA compiled is kept.
RUN useradd --create-home --uid 1000 deepsc && install -d -o deepsc -g deepsc /work
COPY --from=build /opt/deepsc /opt/deepsc
ENV PATH=/opt/deepsc/bin:$PATH \
    PYTHONUNBUFFERED=1
# By number, so that Kubernetes can see that it is not root.
USER 1000:1000
WORKDIR /work
# It is a command, not a service: an orchestrator sees its exit code.
HEALTHCHECK NONE
ENTRYPOINT ["deepsc"]
CMD ["--help"]
