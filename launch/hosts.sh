#!/usr/bin/env bash
# Run a script on all machines of a job of LSF, PBS or Grid Engine, or of a list of your own: one `allstep run` on each.
# Its exit code is the run's; under Grid Engine 85 (preempted) becomes 99, with which the job is queued again.
# docs/howto/schedulers.md explains it.
#
#     bsub -n 16 -R "span[ptile=8]" -o log.%J launch/hosts.sh --nproc 8 train.py --lr 0.1     LSF, started by blaunch
#     qsub -l select=2:ncpus=8 -- "$PWD/launch/hosts.sh" --nproc 8 train.py --lr 0.1          PBS, by pbsdsh
#     qsub -pe PARALLEL_ENVIRONMENT 16 -cwd -V launch/hosts.sh --nproc 8 train.py --lr 0.1    Grid Engine, by qrsh
#     HOSTFILE=machines.txt launch/hosts.sh --nproc 8 train.py --lr 0.1                       by ssh; a name a line
#
# Arguments are those of `allstep run`. The machines share this folder; the one on which this script runs is node 0 and
# has to be in the list. FOLDER is where to work (by default the one of submission), PORT where the machines meet (by
# default one that follows from the job's number), START what starts a command on a machine, before the machine's name,
# such as START="ssh -o BatchMode=yes".
set -euo pipefail

fail() {
    echo "hosts.sh: $1" >&2
    exit 2
}

# The scheduler's list: first words of lines are names of machines, some of them several times, once for each slot.
start=() job=0
if [ -n "${HOSTFILE:-}" ]; then
    list=$HOSTFILE start=(ssh -o BatchMode=yes)
elif [ -n "${LSB_DJOB_HOSTFILE:-}" ]; then
    list=$LSB_DJOB_HOSTFILE job=${LSB_JOBID:-0} start=(blaunch -z)
    FOLDER=${FOLDER:-${LS_SUBCWD:-$PWD}}
elif [ -n "${PBS_NODEFILE:-}" ]; then
    list=$PBS_NODEFILE job=${PBS_JOBID:-0} start=(pbsdsh -n)
    FOLDER=${FOLDER:-${PBS_O_WORKDIR:-$PWD}}
elif [ -n "${PE_HOSTFILE:-}" ]; then
    list=$PE_HOSTFILE job=${JOB_ID:-0} start=(qrsh -inherit -nostdin)
    FOLDER=${FOLDER:-${SGE_O_WORKDIR:-$PWD}}
else
    fail "no list of machines: LSB_DJOB_HOSTFILE, PBS_NODEFILE and PE_HOSTFILE are not set; submit this script, or give HOSTFILE=FILE with a name a line"
fi
[ -r "$list" ] || fail "the list of machines, $list, cannot be read; run this script on the job's first machine, where the scheduler writes it"
[ $# -gt 0 ] || fail "nothing to run; give the arguments of allstep run, such as --nproc 8 train.py"
cd "${FOLDER:-$PWD}"
[ -z "${START:-}" ] || read -ra start <<< "$START"

# Machines in the order of the list, this one first; `lines` has where in the list each is named for the first time.
here=$(hostname) machines=() lines=() own=
while read -r line name; do
    if [ "${name%%.*}" = "${here%%.*}" ]; then
        own=$name
    else
        machines+=("$name") lines+=("$line")
    fi
done < <(awk '$1 !~ /^(#|$)/ { if (!seen[$1]++) print line, $1; line++ }  BEGIN { line = 0 }' "$list")
[ -n "$own" ] || fail "this machine, $here, is not in $list; start the run on one that is"
nodes=$((${#machines[@]} + 1))
job=${job%%.*}
job=${job//[!0-9]/}
# Below the ports that Linux gives away by itself.
port=${PORT:-$((20000 + 10#${job:-0} % 9000))}

# The other machines read what they are to do from a file, so that nothing has to survive several shells' quoting.
file=$(mktemp "$PWD/.hosts-XXXXXX.sh") # nobody else's to read: a secret may be among the variables
clients=()
cleanup() {
    rm -f "$file"
    [ ${#clients[@]} -eq 0 ] || kill "${clients[@]}" 2> /dev/null || true
}
trap cleanup EXIT
{
    printf 'cd %q\n' "$PWD"
    # What the run reads of its environment, and the scheduler does not carry along.
    export -p | grep -E '^declare -x (PATH|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|CONDA_PREFIX|OMP_NUM_THREADS|(ALLSTEP|NCCL|GLOO|TORCH|HF|UCX|FI)_[A-Z_0-9]+)=".*"$' || true
    printf 'exec allstep run --nnodes %q --node-rank "$1" --rdzv %q' "$nodes" "$own:$port"
    printf ' %q' "$@"
    printf '\n'
} > "$file"

for index in "${!machines[@]}"; do
    # pbsdsh takes the place of a line in the list, the others a name.
    target=("${machines[index]}")
    [ "${start[0]}" != pbsdsh ] || target=("${lines[index]}" --)
    "${start[@]}" "${target[@]}" bash "$file" $((index + 1)) < /dev/null &
    clients+=($!)
done
# What a shell starts in its background ignores SIGINT, unless told otherwise.
(
    trap - INT QUIT
    exec bash "$file" 0
) &
head=$!
# A scheduler's notice goes to node 0, which has all ranks stop after the same step. SIGUSR2 is that of LSF at the end of
# a job's time, and of Grid Engine before it kills (`qsub -notify`).
pass_on() {
    came=1
    kill -s "$1" "$head" 2> /dev/null || true
}
trap 'pass_on INT' INT
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM HUP USR2
code=0 came=1
while [ -n "$came" ]; do
    came= # `wait` also returns when a signal came
    wait "$head" && code=0 || code=$?
done
# They end within seconds of node 0; one that never reached it would wait for longer.
left=${#clients[@]}
for _ in $(seq 150); do
    [ "$left" -gt 0 ] || break
    left=0
    for client in "${clients[@]}"; do
        ! kill -0 "$client" 2> /dev/null || left=1
    done
    [ "$left" = 0 ] || sleep 0.1
done
[ -z "${PE_HOSTFILE:-}" ] || [ "$code" != 85 ] || code=99
exit "$code"
