#!/bin/bash
# Runs as the first process of a guest whose kernel has nbd: attach, use, lose the daemon twice, detach.
# Says "ok WHAT" for each thing that is as it should be, and "done" at the end.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
export RUSTORD_SOCKET=/run/rustord/rustord.sock
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
exec > /dev/ttyS0 2>&1 < /dev/null
ok() { local what=$1; shift; if "$@"; then echo "ok $what"; else echo "FAILED $what"; fi; }
status() { local wanted=$1; shift; "$@"; [ $? = "$wanted" ]; }
start() {
    rustord --device /tmp/pool.img --directory /tmp/index --socket $RUSTORD_SOCKET >> /tmp/log 2>&1 &
    daemon=$!
    until curl --silent --unix-socket $RUSTORD_SOCKET http://rustord/v1/pool > /dev/null; do sleep 0.2; done
}
waits() { read -r _ writes < /sys/block/nbd1/inflight && [ "$writes" -gt 0 ]; }
written() { read -r _ _ _ _ writes _ < /sys/block/nbd1/stat && echo "$writes"; }
same_object() { rustorctl get object > /tmp/copy && cmp -n 10485760 /tmp/copy /dev/nbd0; }

modprobe nbd nbds_max=4
mkdir -p /run/rustord /tmp/index /tmp/mnt
rustorctl pool create --size 220MiB /tmp/pool.img
head -c 10485760 /dev/urandom > /tmp/object
head -c 30000000 /dev/urandom > /tmp/data
start
rustorctl put /tmp/object --name object
rustorctl volume create volume --size 128MiB

ok "the object is attached" [ "$(rustorctl attach object)" = /dev/nbd0 ]
ok "the volume is attached" [ "$(rustorctl attach volume --connections 2)" = /dev/nbd1 ]
ok "but not twice" status 15 rustorctl attach volume
ok "the object is read" same_object
ok "and not written" status 1 dd if=/dev/zero of=/dev/nbd0 bs=512 count=1
ok "the kernel knows of the cache" grep -q "write back" /sys/block/nbd1/queue/write_cache
ok "a filesystem is made" mkfs.ext4 -q /dev/nbd1
ok "and mounted" mount -o discard /dev/nbd1 /tmp/mnt
ok "a mounted device stays" status 15 rustorctl detach volume
ok "an attached object stays" status 15 rustorctl delete object

echo 10000 > /sys/block/nbd1/queue/io_timeout  # after which the kernel sends again what it has lost, not 30,000 ms
cp /tmp/data /tmp/mnt/killed
before=$(written)
sync &
writing=$!
until [ "$(written)" -gt "$before" ]; do :; done  # something has been answered that is not flushed
kill -STOP $daemon
until waits; do sleep 0.1; done  # and something will not be answered
kill -9 $daemon
wait $daemon
start
ok "writing waits for a daemon that was killed" wait $writing
kill $daemon
wait $daemon
start
ok "the kernel connects again" cp /tmp/data /tmp/mnt/again
sync
echo 3 > /proc/sys/vm/drop_caches
ok "nothing is lost when the daemon is killed" cmp /tmp/data /tmp/mnt/killed
ok "nor when it is started again" cmp /tmp/data /tmp/mnt/again
ok "the object is still read" same_object
ok "room is given back" fstrim /tmp/mnt
ok "it is unmounted" umount /tmp/mnt
ok "the filesystem is in order" fsck.ext4 -fn /dev/nbd1
ok "the volume is detached" rustorctl detach volume
ok "and the object" rustorctl detach /dev/nbd0
ok "nothing is attached" [ "$(rustorctl attached --json)" = "[]" ]
until [ "$(rustorctl exports --json)" = "[]" ]; do sleep 0.2; done
ok "nobody stays behind" true
ok "the object is deleted" rustorctl delete object
ok "nothing went wrong inside" status 1 grep Traceback /tmp/log
echo done
sync
echo o > /proc/sysrq-trigger
sleep 60
