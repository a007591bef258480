#!/usr/bin/env bash
# Makes three OCI archives in img/, after build.sh: pause, KubeRay's operator, and a light stand-in for Ratchet's image,
# which is a Debian with Ratchet's user, and commands that run what is mounted: $SOURCE/.venv and its CPython.
. "$(dirname "$0")/common.sh"
checkout
mkdir -p "$img/pause" "$img/kuberay"

cp "$bin/pause" "$img/pause/"
cp "$bin/ray-operator" "$img/kuberay/manager"

root=$img/ratchet
if [ ! -d "$root" ]; then
  rm -rf --one-file-system "$root.part"
  packages=ca-certificates,libbz2-1.0,libexpat1,libffi8,libgomp1,liblzma5,libncursesw6,libpq5,libreadline8,libsqlite3-0
  packages+=,libssl3,libuuid1,procps,zlib1g
  debootstrap --variant=minbase --include=$packages bookworm "$root.part"
  chroot "$root.part" groupadd --gid 10001 ratchet
  chroot "$root.part" useradd --uid 10001 --gid ratchet --create-home --shell /usr/sbin/nologin ratchet
  chroot "$root.part" install --directory --owner ratchet --group ratchet --mode 0750 /var/lib/ratchet /run/ratchet
  chroot "$root.part" apt-get clean
  mv "$root.part" "$root"
fi
for folder in "$python" "$source"; do # where they are mounted, with parents that the user may pass through
  mkdir -p "$root$folder"
  while [ "$folder" != / ]; do chmod a+rx "$root$folder"; folder=$(dirname "$folder"); done
done
for command in ratchet ratchet-haproxy ray serve python python3; do # KubeRay's login shell has /usr/local/bin in its PATH
  printf '#!/bin/sh\nexec "%s/.venv/bin/%s" "$@"\n' "$source" $command > "$root/usr/local/bin/$command"
  chmod 755 "$root/usr/local/bin/$command"
done

python3 "$here/oci_image.py" "$img/pause" docker.io/local/pause:1 "$img/pause.tar" entrypoint=/pause user=65535
python3 "$here/oci_image.py" "$img/kuberay" docker.io/local/kuberay:1 "$img/kuberay.tar" entrypoint=/manager
python3 "$here/oci_image.py" "$root" docker.io/local/ratchet:1 "$img/ratchet.tar" entrypoint=ratchet user=10001:10001 \
  env=PYTHONUNBUFFERED=1 env=PYTHONDONTWRITEBYTECODE=1 env=RAY_USAGE_STATS_ENABLED=0 env=RATCHET_HOME=/var/lib/ratchet
