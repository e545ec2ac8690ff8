#!/bin/sh
# Starts a node, freezes a warm guest, forks 100 children that prove what their memory holds, and leaves them running.
# Its socket, data and log are in target/demo. Run again, it starts anew.
set -eu
cd "$(dirname "$0")/.."
here=target/demo
farfork=target/release/farfork
FARFORK_SOCKET="$PWD/$here/run/farfork.sock"
export FARFORK_SOCKET

stop_earlier() {
    [ -f $here/data/lock ] || return 0
    pid=$(cat $here/data/lock)
    # Only if it is ours: the number may be another process's by now.
    if [ -n "$pid" ] && grep -qs "$here/data" "/proc/$pid/cmdline" 2>/dev/null; then
        echo "stopping the node of an earlier demo (process $pid)"
        kill "$pid"
        while [ -d "/proc/$pid" ]; do sleep 0.1; done
    fi
}

if ! report=$($farfork doctor 2>&1); then
    echo "$report"
    echo "error: this host cannot run machines yet: see above what to do" >&2
    exit 4
fi
stop_earlier
rm -rf $here
mkdir -p $here
setsid $farfork node --data "$PWD/$here/data" 2>$here/node.log </dev/null >/dev/null &
waited=0
until grep -q ready $here/node.log 2>/dev/null; do
    waited=$((waited + 1))
    if [ $waited -gt 300 ]; then
        cat $here/node.log >&2
        echo "error: the node does not start" >&2
        exit 3
    fi
    sleep 0.1
done
pid=$(cat $here/data/lock)
echo "node      up: process $pid, log in $here/node.log"

echo "fork      a warm guest is frozen into an image; 100 children are born from it, each compares its memory and says who it is"
$farfork fork --guest probe -n 100 --memory 64MiB --verify >$here/children
head -4 $here/children | sed 's/^/          /'
echo "          ... and 95 more"
sed -n '$p' $here/children | sed 's/^/          /'
image=$(sed -n '$s/.*image \([0-9a-f]*\).*/\1/p' $here/children)
child=$(sed -n '2s/ .*//p' $here/children)

echo "again     20 more, now that shells are ready"
$farfork fork --from "$image" -n 20 --verify >$here/more
head -4 $here/more | sed 's/^/          /'
sed -n '$p' $here/more | sed 's/^/          /'

cat <<END

120 children are running. Try next:

  export FARFORK_SOCKET=$FARFORK_SOCKET
  $farfork ls                          # what runs
  $farfork show $child                 # what one of them costs
  $farfork branch $child -n 3          # fork a running machine: it goes on, and so do three copies
  $farfork image save $image warm      # keep the image; image load warm brings it back after a restart
  $farfork kill --all                  # and kill $pid stops the node
END
