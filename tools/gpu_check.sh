#!/usr/bin/env bash
# Does the GPU path work, and what does it cost? At most ten minutes; downloads nothing.
#
#     pip install -r requirements-dev.txt
#     bash tools/gpu_check.sh 2>&1 | tee gpu_check.txt        then paste gpu_check.txt into an issue
#
# A part that fails or runs out of time is reported, and the next one starts. It also runs on a CPU,
# which is how it was tried, but then most parts run out of time: MINUTES=30 gives them more.
set -u
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
deadline=$((60 * ${MINUTES:-10}))
summary=""

# part NAME LINES COMMAND...: run a command and show the last LINES lines of what it prints
part() {
    local name=$1 lines=$2 started=$SECONDS result
    shift 2
    printf '\n== %s\n' "$name"
    timeout -k 5 $((deadline > SECONDS ? deadline - SECONDS : 1)) "$@" >"$work/log" 2>&1
    case $? in
        0) result=ok ;;
        124 | 137) result="out of time" ;;
        *) result=FAILED; lines=40 ;;
    esac
    tr '\r' '\n' <"$work/log" | tail -n "$lines"
    summary+=$(printf '%-28s %-12s %4d s' "$name" "$result" $((SECONDS - started)))$'\n'
}

machine() {
    git log -1 --format='commit %h, %cs' 2>/dev/null
    python - <<'END'
import platform, bitsandbytes, peft, torch, transformers
print(platform.platform(), "Python", platform.python_version())
print("torch", torch.__version__, "transformers", transformers.__version__)
print("peft", peft.__version__, "bitsandbytes", bitsandbytes.__version__)
if torch.cuda.is_available():
    free, total = (number / 2**30 for number in torch.cuda.mem_get_info())
    print(torch.cuda.get_device_name(), f"{free:.1f} of {total:.1f} GiB free")
    print("bf16:", torch.cuda.is_bf16_supported(including_emulation=False))
else:
    print("No CUDA device: this is a check of the script only.")
END
}

# Kill a run in the middle of a stage, start it again, and compare it with the run that was left alone.
resume() {
    python pit.py all --smoke --run "$work/killed" >/dev/null 2>&1 &
    local pid=$!
    until ls "$work"/killed/checkpoints/p*_rl*/0* >/dev/null 2>&1; do
        sleep 0.2
        kill -0 $pid 2>/dev/null || return 1  # it ended before it could be killed
    done
    kill -9 $pid
    wait $pid 2>/dev/null
    python pit.py all --smoke --run "$work/killed" || return 1
    local same=0 all=0 folder
    for folder in "$work"/smoke/adapters/*/; do
        ((all += 1))
        cmp -s "$folder/adapter_model.safetensors" \
            "$work/killed/adapters/$(basename "$folder")/adapter_model.safetensors" && ((same += 1))
    done
    # for information: on a GPU, kernels may add up in another order
    echo "killed in RL and continued: $same of $all adapters are equal bit for bit"
}
export -f resume machine
export work

part "machine" 10 bash -c machine
part "all --smoke" 12 python pit.py all --smoke --run "$work/smoke"
part "kill and resume" 3 bash -c resume
part "random weights" 1 python tools/bench.py make "$work/model"
part "stages in 4-bit" 20 python tools/bench.py stages --model "$work/model" --steps 1
part "stages unquantised" 20 python tools/bench.py stages --model "$work/model" --steps 1 --bits 16
part "the built-in run" 22 python pit.py all --run "$work/tiny"
part "tests" 8 python -m pytest -q
printf '\n== summary\n%s' "$summary"
