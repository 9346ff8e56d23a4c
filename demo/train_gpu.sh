#!/usr/bin/env bash
# Train the demo on one data-centre GPU: bash demo/train_gpu.sh [MINUTES] [MORE ARGUMENTS OF demo.train]
# Ends with code 3 after MINUTES (default 9) when there is more to do; the same command goes on where it was. About 25 minutes
# in all, evaluation included. Clips are rendered beside the first phase, on all CPU cores but two.
# Environment: PYTHON, CLIPS, STATE (folder of clips and states), OUT (folder of the results; files of at most 16 MiB).
set -euo pipefail
cd "$(dirname "$0")/.."
minutes=${1:-9}
shift || true
python=${PYTHON:-python3} clips=${CLIPS:-5000} state=${STATE:-build/demo} out=${OUT:-build/demo/out}
mkdir -p "$state/data/train" "$out"
state=$(realpath "$state")
data=$state/data

# Where the package is not installed, its folders as pyproject.toml puts them together.
if ! "$python" -c "import factorportrait.export" 2>/dev/null; then
    site=$state/site
    mkdir -p "$site/factorportrait"
    ln -sfn "$PWD"/factorportrait/*.py "$site/factorportrait/"
    for part in export engines runtime benchmarks demo; do ln -sfn "$PWD/$part" "$site/factorportrait/$part"; done
    export PYTHONPATH=$site:$PWD${PYTHONPATH:+:$PYTHONPATH}
    # python -m looks into this folder first, where factorportrait is without the parts that are linked above.
    export PYTHONSAFEPATH=1
fi

workers=$(($(nproc) > 3 ? $(nproc) - 2 : 1))
for split in val test; do
    "$python" -m demo.dataset --out "$data/$split" --split "$split" --clips 64 --workers "$workers" | tail -n 1
done
# In a session of its own, so that it goes on between two runs; a second one finds the lock taken.
setsid flock -n "$state/render.lock" "$python" -m demo.dataset --out "$data/train" --split train --clips "$clips" \
    --workers "$workers" >>"$state/render.log" 2>&1 </dev/null &
for _ in $(seq 120); do # until the first shards are there
    [ "$(find "$data/train" -name 'shard-*.npz' | wc -l)" -ge "$workers" ] && break
    sleep 1
done

code=0
"$python" -m demo.train all --preset gpu --data "$data" --work "$state/work" --out "$state/checkpoint" \
    --stop-after "$minutes" "$@" || code=$?
cat "$state"/work/*.jsonl >"$out/curves.jsonl"
for file in "$state"/checkpoint/* "$state"/work/metrics.json "$state"/work/contact_sheet.png; do
    [ ! -e "$file" ] || cp -f "$file" "$out/"
done
exit "$code"
