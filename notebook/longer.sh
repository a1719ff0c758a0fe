#!/bin/sh
# The shipped model, trained on in longer windows or story by story, and what it then makes of longer texts:
#
#   sh notebook/longer.sh ./mamba_cuda TRAIN.txt VALID.txt >notebook/longer.csv     (from the project's root; some minutes on one GPU)
#
# 400 steps of 65,536 tokens, so that what differs is the length of a window alone. With --carry-state a window ends with its story
# (some 200 tokens; a longer one's next window goes on from its state): 10 million tokens in all. Stories apart by <|endoftext|>.
set -e
program=$1 data=$2 made=$(mktemp -d)
trap 'rm -r "$made"' EXIT
python3 -c 'import sys; print(*("<|endoftext|>" + s.strip() for s in sys.stdin.read().split("<|endoftext|>") if s.strip()), sep="", end="")' \
  <"$3" >"$made/text"

measure() {  # NAME MODEL
  "$program" perplexity --model "$2" --text "$made/text" --lengths 128,256,512,1024,2048,4096,8192,16384,32768 \
    --delta-ratio 1,0.8,0.65 --csv "$made/csv" >&2
  sed "1d; s/^/$1,/" "$made/csv"
}
train() {  # NAME OPTIONS
  name=$1; shift
  "$program" train --model weights/stories --data "$data" --dtype bf16 --out "$made/$name" "$@" --steps 400 --lr 1e-3 --warmup 20 \
    --weight-decay 1 >&2
  cp weights/stories/tokenizer.json "$made/$name"
  measure "$name" "$made/$name"
}

echo model,length,tokens,nll,perplexity,delta_ratio
measure shipped weights/stories
train 512 --length 512 --batch 128
train 1024 --length 1024 --batch 64
train 2048 --length 2048 --batch 32
train 4096 --length 4096 --batch 16
train "512 carried" --length 512 --batch 128 --carry-state
