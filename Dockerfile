# The images of operator and agent:
#
#   docker build --target operator -t operator .
#   docker build --target agent -t agent .
#
# Every base is an ARG. With BINARIES=prebuilt the context holds `operator` and `agent`, built elsewhere, and LICENSE.
ARG RUST=docker.io/library/rust:1.95-bookworm
ARG DEBIAN=docker.io/library/debian:bookworm-slim
# any image with glibc 2.36 or newer and libgcc; a shell is not needed
ARG OPERATOR_BASE=gcr.io/distroless/cc-debian12
# any image with libvirt's client library 11, qemu-img and qemu-nbd 10
ARG AGENT_BASE=libvirt
ARG BINARIES=build

FROM ${RUST} AS build
# libvirt 11 and QEMU 10 are in Debian 12's backports
RUN echo 'deb http://deb.debian.org/debian bookworm-backports main' >/etc/apt/sources.list.d/backports.list \
 && apt-get update \
 && apt-get install -y --no-install-recommends -t bookworm-backports libvirt-dev pkg-config
WORKDIR /source
COPY . .
ENV CARGO_PROFILE_RELEASE_STRIP=symbols
RUN cargo build --locked --release --no-default-features --bin operator \
 && cp target/release/operator /operator \
 && cargo build --locked --release --bin agent \
 && cp target/release/agent /agent

FROM scratch AS prebuilt
COPY operator agent /

FROM ${DEBIAN} AS libvirt
RUN echo 'deb http://deb.debian.org/debian bookworm-backports main' >/etc/apt/sources.list.d/backports.list \
 && apt-get update \
 && apt-get install -y --no-install-recommends -t bookworm-backports libvirt0 qemu-utils \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*

FROM ${BINARIES} AS binaries

# No libvirt, no shell, no root; the root file system may be read-only.
FROM ${OPERATOR_BASE} AS operator
ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Virtmark operator" \
      org.opencontainers.image.description="Incremental backup of running libvirt virtual machines: validates, binds, publishes" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY LICENSE /usr/share/doc/virtmark/LICENSE
COPY --from=binaries --chmod=0755 /operator /usr/bin/operator
USER 65532:65532
ENTRYPOINT ["/usr/bin/operator"]

# Root in its container: it gives files to QEMU's user, and opens images and sockets that are QEMU's.
FROM ${AGENT_BASE} AS agent
ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Virtmark agent" \
      org.opencontainers.image.description="Incremental backup of running libvirt virtual machines: does the work on its node" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY LICENSE /usr/share/doc/virtmark/LICENSE
COPY --from=binaries --chmod=0755 /agent /usr/bin/agent
USER 0:0
ENTRYPOINT ["/usr/bin/agent"]
