# Sourced by the scripts beside it: one virtual environment in .venv, made once and brought up to date only when what
# it is made from has changed. Usage: allstep_environment EXTRA
# PYTHON chooses the interpreter (3.11 or newer); an active virtual environment is not used, so that nothing in it is
# changed.
allstep_environment() {
    local extra=$1 python=${PYTHON:-python3} stamp made
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "allstep needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set PYTHON=/path/to/python3.11" >&2
        return 1
    }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    stamp=.venv/.installed-$extra
    made=$(cat pyproject.toml constraints.txt | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$made" ]; then
        echo "installing allstep[$extra] into .venv" >&2
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extra]"
        echo "$made" > "$stamp"
    fi
    PATH=$PWD/.venv/bin:$PATH
}
