#!/bin/sh
# Brings up three nodes, warms a Python template with a dataset in memory on one of them, and has 300 tasks evaluate a shard each,
# wherever the cluster forks them. Their sum is compared with a direct one. The cluster runs on. Its data and logs are in
# target/demo. Run again, it goes on with the same cluster and template.
set -eu
cd "$(dirname "$0")/.."
here=$PWD/target/demo
farfork=target/release/farfork
numbers=2000000
tasks=300

say() { printf '%-9s %s\n' "$1" "$2"; }

if ! report=$($farfork doctor 2>&1); then
    echo "$report"
    echo "error: this host cannot run machines yet: see above what to do" >&2
    exit 4
fi
mkdir -p "$here"
# What the tasks have in common: loaded, and computed, before the fork.
cat >"$here/dataset.py" <<END
from array import array
NUMBERS = array("Q", ((i * 7919 + 12345) % 1000003 for i in range($numbers)))
def shard(index, of):
    return sum(NUMBERS[index::of])
END

say nodes "three of them, each with a network namespace of its own if this is root"
$farfork up --nodes 3 --data "$here/nodes" >"$here/up"
sed -n '/./{/now try/q;s/^/          /p}' "$here/up"
FARFORK_SOCKET=$(sed -n 's/^ *export FARFORK_SOCKET=//p' "$here/up")
export FARFORK_SOCKET

if $farfork template show demo >/dev/null 2>&1; then
    say template "demo is there from before"
else
    say template "a Linux guest boots, starts Python and computes $numbers numbers: half a minute where KVM emulates kernels"
    dataset=$(base64 -w 0 "$here/dataset.py")
    $farfork template build demo --rootfs python --memory 192MiB \
        --warm "echo $dataset | base64 -d > /usr/lib/farfork/dataset.py" \
        --main 'python3 /usr/lib/farfork/main.py dataset' >"$here/template"
    sed 's/^/          /' "$here/template"
fi

say run "$tasks tasks, each a child of that interpreter; a node takes 20 at a time here, so that all have some"
$farfork run demo -n $tasks --cpus 0.1 --name demo --eval "dataset.shard({index}, $tasks)" \
    --results "$here/results.jsonl" 2>"$here/summary" || { cat "$here/summary" >&2; exit 5; }
sed 's/^/          /' "$here/summary"

sum=$(sed -n 's/.*"value":"\([0-9]*\)".*/\1/p' "$here/results.jsonl" | awk '{ s += $1 } END { printf "%.0f", s }')
direct=$(awk -v n=$numbers 'BEGIN { for (i = 0; i < n; i++) s += (i * 7919 + 12345) % 1000003; printf "%.0f", s }')
if [ "$sum" != "$direct" ]; then
    echo "error: the tasks' sum is $sum, and a direct one $direct: see $here/results.jsonl" >&2
    exit 1
fi
say sum "$sum, as computed directly"

say stages "of $tasks children, in ms (from their node's order to fork):"
for stage in first ready done; do
    sed -n "s/.*\"${stage}_us\":\([0-9]*\).*/\1/p" "$here/results.jsonl" | sort -n | awk -v stage=$stage '
        { us[NR] = $1 }
        END { printf "          %-6s p50 %9.2f   p99 %9.2f\n", stage, us[int((NR + 1) / 2)] / 1000, us[int(NR * 0.99 + 0.5)] / 1000 }'
done

cat <<END

Three nodes are running. Try next:

  export FARFORK_SOCKET=$FARFORK_SOCKET
  $farfork top                                       # nodes, templates and jobs, live
  $farfork job ls                                     # what was just run
  $farfork explain demo -n 100                        # where 100 more would go, and why
  $farfork run demo -n 1000 --eval 'dataset.shard({index}, 1000)' | head -3
  $farfork down --data $here/nodes                    # stop them; make demo starts them again
END
