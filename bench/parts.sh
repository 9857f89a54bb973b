# The parts of cpu.sh and gpu.sh, which source this: each with its name and its own time limit; the others go on after
# one that failed or ran over. With names as arguments only those parts run, and share the whole time.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
only=("$@")
known=()
failed=()

part() { # NAME SECONDS WORDS...
    local name=$1 seconds=$2 code
    shift 2
    known+=("$name")
    if ((${#only[@]})); then
        [[ " ${only[*]} " == *" $name "* ]] || return 0
        seconds=$((whole / ${#only[@]}))
    fi
    echo "== $name: $*"
    timeout "$seconds" "$python" "$@"
    code=$?
    ((code == 0)) || failed+=("$name ($( ((code == 124)) && echo "cut off after $seconds s" || echo "exit $code"))")
}

report() {
    local name
    for name in "${only[@]}"; do
        [[ " ${known[*]} " == *" $name "* ]] || failed+=("$name (there is none; there are ${known[*]})")
    done
    for name in "${failed[@]}"; do echo "failed: $name"; done
    exit ${#failed[@]}
}
