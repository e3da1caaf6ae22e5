#!/usr/bin/env bash
# Checks this machine, then installs what demo and tests need and it lacks: Debian packages (libvirt and QEMU from
# backports) and the stock ovirt-imageio client, in a venv of the cache. Nothing is changed before all checks passed.
# The system's own apt sources are left as they are. Arguments are more packages, which a benchmark needs.
set -euo pipefail

cache="${XDG_CACHE_HOME:-$HOME/.cache}/virtmark"
client="ovirt-imageio==2.5.1"
packages=(libvirt-daemon libvirt-daemon-driver-qemu libvirt-daemon-system libvirt-clients libvirt-dev
  qemu-system-x86 qemu-utils libnbd-bin pkg-config debootstrap e2fsprogs util-linux python3-venv python3-dev gcc libc6-dev curl prometheus "$@")

missing=()
need() { missing+=("$1"); }

[ "$(id -u)" = 0 ] || need "root: the hypervisors are namespaces of their own. Run this with sudo, or as root."
command -v apt-get >/dev/null && grep -q '^VERSION_CODENAME=bookworm' /etc/os-release ||
  need "Debian 12 (bookworm): libvirt 11 and QEMU 10 come from its backports."
command -v go >/dev/null && [[ "$(go env GOVERSION 2>/dev/null)" =~ ^go1\.(2[6-9]|[3-9][0-9]) ]] ||
  need "Go 1.26 or newer, to build etcd and kube-apiserver: https://go.dev/dl"
command -v cargo >/dev/null || need "Rust, with rustup: https://rustup.rs"
command -v python3 >/dev/null && python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' ||
  need "Python 3.9 or newer, for the stock ovirt-imageio client: apt-get install python3"
if [ "${#missing[@]}" -gt 0 ]; then
  echo "This machine lacks:" >&2
  printf ' - %s\n' "${missing[@]}" >&2
  echo "Nothing was changed." >&2
  exit 1
fi

installed() { # package [minimum version]
  local version
  version="$(dpkg-query -W -f='${db:Status-Status} ${Version}' "$1" 2>/dev/null)" || return 1
  [[ "$version" == installed\ * ]] && { [ $# = 1 ] || dpkg --compare-versions "${version#* }" ge "$2"; }
}

all_installed() {
  local package
  for package in "${packages[@]}"; do installed "$package" || return 1; done
  installed libvirt-daemon 11 && installed qemu-system-x86 1:10
}

if ! all_installed; then
  echo "installing Debian packages: ${packages[*]}"
  mkdir -p "$cache"
  sources="$cache/bookworm.list"
  for suite in bookworm bookworm-updates bookworm-backports; do
    echo "deb http://deb.debian.org/debian $suite main"
  done >"$sources"
  # another apt may be at work
  apt=(apt-get -q -o DPkg::Lock::Timeout=600 -o Dir::Etc::sourcelist="$sources" -o Dir::Etc::sourceparts=/dev/null)
  "${apt[@]}" update
  DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y -t bookworm-backports --no-install-recommends "${packages[@]}"
fi

venv="$cache/venv-$(echo "$client $(python3 --version)" | sha256sum | cut -c1-16)"
if [ ! -x "$venv/bin/python" ]; then
  echo "installing $client in $venv"
  { python3 -m venv "$venv" && "$venv/bin/pip" install -q "$client"; } || { rm -rf "$venv"; exit 1; }
fi
ln -sfn "$venv" "$cache/venv"
