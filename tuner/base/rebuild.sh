#!/usr/bin/env bash
# Makes the embedded base model "pocket" from nothing: about an hour and a half on a CPU core, minutes on a GPU.
#
#   pip install -e '.[rebuild]' && tuner/base/rebuild.sh FOLDER
#
# Every step can be stopped and started again; training goes on from its checkpoints.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
mkdir -p "$1" && cd "$1"
processes=${PROCESSES:-1}
launch=(accelerate launch --mixed_precision bf16)
if ! python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
  export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
fi
if [ "$processes" -gt 1 ]; then
  launch+=(--multi_gpu --num_processes "$processes")
fi

if [ ! -d package ]; then
  npm pack @iconify-json/noto@1.2.9 && tar xzf iconify-json-noto-1.2.9.tgz
fi
if [ ! -d pictures ]; then
  python -m tuner.base.pictures --icons package --out pictures.tmp && mv pictures.tmp pictures
fi
if [ ! -d autoencoder/vae ]; then
  python -m tuner.base.autoencoder "$here/autoencoder.toml" # its narrow convolutions gain nothing from two processes
fi
if [ ! -d initial ]; then
  python -m tuner.base.initial --vae autoencoder/vae --out initial
fi
if [ ! -d unet/model ]; then
  "${launch[@]}" "$root/recipes/full.py" "$here/train.toml"
fi
python -m tuner.base.evaluate --model unet/model --pictures pictures --out evaluation
mkdir -p "$here/pocket" && cp -r unet/model/. "$here/pocket/" # its card and notices stay
echo "made $here/pocket"
