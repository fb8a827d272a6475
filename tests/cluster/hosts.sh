#!/usr/bin/env bash
# Hosts of our own on one machine, each with an sshd: hosts.sh up N | down | x HOST COMMAND... | cut HOST | join HOST
#
# `drv` (10.77.0.1, no sshd) and h0, h1, ... (10.77.0.10, .11, ...) are joined by a bridge in a namespace of its own.
# Each has its own network, processes, mounts, name and IPC; its root is a copy-on-write overlay of this machine's, kept
# in memory; /shared is common to all. Needs root, iproute2, util-linux, openssh and rsync.
#
# HOSTS_DIR: scratch folder. HOSTS_PREFIX: of the namespaces, at most 6 characters. VENV: on every host's PATH.
# SHARED: what /shared is (default HOSTS_DIR/shared). OWNER: a process whose end takes the hosts down.
set -euo pipefail
readonly W=${HOSTS_DIR:?a scratch folder} P=${HOSTS_PREFIX:?a prefix} VENV=${VENV:?a virtual environment}
readonly SHARED=${SHARED:-$W/shared}
readonly SSHD=(
  /usr/sbin/sshd -D -e -f /dev/null -h /etc/ssh-host-key -o Port=22 -o PidFile=none -o UsePAM=no -o StrictModes=no
  -o PasswordAuthentication=no -o KbdInteractiveAuthentication=no -o PermitRootLogin=prohibit-password
  -o MaxStartups=50 -o "Subsystem=sftp internal-sftp"
)

connect() { # name address
  ip netns add "$P-$1"
  ip link add "$P-v$1" netns "$P-sw" type veth peer name eth0 netns "$P-$1"
  ip -n "$P-sw" link set "$P-v$1" master br0 up
  ip -n "$P-$1" link set lo up
  ip -n "$P-$1" link set eth0 up
  ip -n "$P-$1" addr add "$2/24" dev eth0
  ip -n "$P-$1" route add default dev eth0 # Ray finds its own address by asking for the route to the world
}

start() { # name address command...
  local name=$1 address=$2
  shift 2
  mkdir -p "$W/$name/root"
  connect "$name" "$address"
  cat >"$W/$name/init.sh" <<INIT
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs $W/$name/root
cd $W/$name/root
mkdir upper work m
mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work m
mount -t proc proc m/proc
mount --rbind /dev m/dev
mount -t tmpfs tmpfs m/dev/shm
mount --rbind /sys m/sys
mkdir -p m/shared m/run/sshd m/root/.ssh
chmod 755 m/run/sshd
chmod 700 m/root/.ssh
mount --bind $SHARED m/shared
[ -e m$VENV/bin/python ] || { mkdir -p m$VENV; mount --bind $VENV m$VENV; }
rm -rf m/tmp/ray m/tmp/ray_ssh_* m/root/.ray
hostname $name
printf '127.0.0.1 localhost\n$address $name\n' >m/etc/hosts
echo 'export PATH=$VENV/bin:\$PATH' >m/etc/profile.d/hosts-venv.sh
if [ $name = drv ]; then
  install -m 600 $W/key m/root/.ssh/hosts_key
else
  install -m 600 $W/key.pub m/root/.ssh/authorized_keys
  ssh-keygen -q -t ed25519 -N '' -f m/etc/ssh-host-key
fi
cd m
exec chroot . "\$@"
INIT
  setsid ip netns exec "$P-$name" unshare --mount --pid --uts --ipc --fork --kill-child=KILL \
    env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 bash "$W/$name/init.sh" "$@" \
    >"$W/$name/log" 2>&1 </dev/null &
  echo $! >"$W/$name/outer.pid"
}

wait_for() { # name: until its first process, the only child of unshare, is what it was started for
  local child
  for _ in $(seq 200); do
    child=$(pgrep -P "$(cat "$W/$1/outer.pid")" || true)
    if [ -n "$child" ] && tr '\0' ' ' <"/proc/$child/cmdline" | grep -Eq '^(sleep|sshd|/usr/sbin/sshd)'; then
      echo "$child" >"$W/$1/init.pid"
      return
    fi
    sleep .05
  done
  echo "$1 did not start: $(cat "$W/$1/log")" >&2
  exit 1
}

up() { # number of hosts beside drv
  mkdir -p "$W" "$SHARED"
  if [ -n "${OWNER:-}" ]; then
    # shellcheck disable=SC2016 # the inner shell expands it
    setsid bash -c 'tail --pid="$1" -f /dev/null; exec "$2" down' watch "$OWNER" "$(realpath "$0")" \
      >/dev/null 2>&1 </dev/null &
    echo $! >"$W/watch.pid"
  fi
  [ -f "$W/key" ] || ssh-keygen -q -t ed25519 -N '' -f "$W/key"
  ip netns add "$P-sw"
  ip -n "$P-sw" link add br0 type bridge
  ip -n "$P-sw" link set br0 up
  start drv 10.77.0.1 sleep infinity
  for ((i = 0; i < $1; i++)); do start "h$i" "10.77.0.$((10 + i))" "${SSHD[@]}"; done
  wait_for drv
  for ((i = 0; i < $1; i++)); do wait_for "h$i"; done
}

down() {
  local file pid name
  # Its first process takes all others of a host along, and the last of them the mounts.
  for file in "$W"/*/outer.pid; do
    [ -f "$file" ] || continue
    pid=$(cat "$file")
    kill -KILL "$pid" 2>/dev/null || continue
  done
  for name in $(ip netns list | awk -v p="$P-" 'index($1, p) == 1 {print $1}'); do
    for _ in $(seq 200); do
      [ -n "$(ip netns pids "$name")" ] || break
      sleep .05
    done
    ip netns del "$name"
  done
  rm -rf "$W"/drv "$W"/h[0-9]*
  if [ -f "$W/watch.pid" ]; then
    pid=$(cat "$W/watch.pid")
    rm "$W/watch.pid"
    [ "$pid" = $$ ] || kill -- "-$pid" 2>/dev/null || true
  fi
}

case $1 in
up) up "$2" ;;
down) down ;;
x)
  host=$2
  shift 2
  cd /
  # shellcheck disable=SC2016 # the host's shell expands it
  exec nsenter -t "$(cat "$W/$host/init.pid")" -m -p -n -u -i -r -w env -i HOME=/root USER=root TERM=dumb LANG=C.UTF-8 \
    RAY_USAGE_STATS_ENABLED=0 PATH="$VENV/bin:/usr/sbin:/usr/bin:/sbin:/bin" sh -c 'cd /root; exec "$@"' sh "$@"
  ;;
cut) ip -n "$P-sw" link set "$P-v$2" down ;;
join) ip -n "$P-sw" link set "$P-v$2" up ;;
*)
  sed -n 2p "$0" >&2
  exit 2
  ;;
esac
