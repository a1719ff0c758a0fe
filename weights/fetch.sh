#!/usr/bin/env bash
# Download a published checkpoint, as published, with its tokenizer. See --help.
#
# The list of files, their sizes and checksums come from the Hub's API:
#   GET $HF_ENDPOINT/api/models/MODEL/revision/REVISION?blobs=true
# Large files (LFS) have a SHA-256 there, small ones the id that git gives their content:
# SHA-1 of "blob SIZE\0" and the bytes. A file gets its name only after both agree.
set -euo pipefail

usage() {
  cat <<'END'
usage: weights/fetch.sh MODEL[@REVISION] [DIR]

Download a Mamba or Mamba-2 checkpoint from the Hugging Face Hub into DIR
(default: the last part of MODEL's name, beside this script).

  weights/fetch.sh state-spaces/mamba-130m-hf
  weights/fetch.sh state-spaces/mamba2-130m /tmp/mamba2

Takes config.json, the weights (safetensors if there are, else pytorch_model.bin, whole or
in shards), tokenizer.json and generation_config.json. The original state-spaces models have
no tokenizer: theirs is EleutherAI/gpt-neox-20b's. Every size and checksum is verified.
Interrupted, it goes on where it stopped when called again.

environment, as the Hub's own tools read it:
  HF_ENDPOINT   server, default https://huggingface.co
  HF_TOKEN      access token for gated or private models; else HUGGING_FACE_HUB_TOKEN, else
                the file HF_TOKEN_PATH, HF_HOME/token or ~/.cache/huggingface/token
also:
  FETCH_TRIES     attempts without progress before giving up, default 5
  FETCH_DELAY     seconds before the second attempt, doubled for each later one, default 1
  FETCH_PATIENCE  seconds that a file may take beyond its time at 100 kB/s, default 600

needs: curl, jq, sha256sum and sha1sum (or shasum)
exit status: 0 done, 1 failed, 2 wrong usage
END
}

note() { printf 'fetch.sh: %s\n' "$*" >&2; }
die() { note "$*"; exit 1; }
misuse() { note "$* (see --help)"; exit 2; }

# ---- what was asked

case ${1-} in -h | --help) usage; exit 0 ;; esac
[ $# -eq 1 ] || [ $# -eq 2 ] || misuse "expected MODEL and perhaps DIR, found $# arguments"
model=${1%%@*}
revision=main
case $1 in *@*) revision=${1#*@} ;; esac
part='[A-Za-z0-9_][A-Za-z0-9._-]*'
[[ $model =~ ^$part/$part$ ]] || misuse "MODEL: expected OWNER/NAME, found '$model'"
[[ $revision =~ ^$part(/$part)*$ ]] || misuse "REVISION: expected a name, found '$revision'"
dir=${2-$(dirname "$0")/${model#*/}}
[ -n "$dir" ] || misuse "DIR: is empty"
case $dir in -*) dir=./$dir ;; esac

endpoint=${HF_ENDPOINT:-https://huggingface.co}
endpoint=${endpoint%/}
case $endpoint in # a secure server must not send us on to an insecure one
  https://*) protocols='=https' ;;
  http://*) protocols='=http,https' ;;
  *) misuse "HF_ENDPOINT: expected http:// or https://, found '$endpoint'" ;;
esac
tries=${FETCH_TRIES:-5}
first_delay=${FETCH_DELAY:-1}
[[ $tries =~ ^[1-9][0-9]*$ ]] || misuse "FETCH_TRIES: expected a count, found '$tries'"
patience=${FETCH_PATIENCE:-600}
[[ $first_delay =~ ^[0-9]{1,6}$ ]] || misuse "FETCH_DELAY: expected seconds, found '$first_delay'"
[[ $patience =~ ^[0-9]{1,9}$ ]] || misuse "FETCH_PATIENCE: expected seconds, found '$patience'"

for tool in curl jq; do
  command -v "$tool" >/dev/null || die "$tool is missing: apt-get install $tool"
done
if command -v sha256sum >/dev/null; then
  sha256() { sha256sum | cut -d ' ' -f 1; }
  sha1() { sha1sum | cut -d ' ' -f 1; }
else
  sha256() { shasum -a 256 | cut -d ' ' -f 1; }
  sha1() { shasum -a 1 | cut -d ' ' -f 1; }
fi

token=${HF_TOKEN:-${HUGGING_FACE_HUB_TOKEN:-}}
token_file=${HF_TOKEN_PATH:-${HF_HOME:-${XDG_CACHE_HOME:-${HOME-}/.cache}/huggingface}/token}
if [ -z "$token" ] && [ -r "$token_file" ]; then token=$(<"$token_file"); fi
token=${token//[[:space:]]/}
[[ $token =~ ^[A-Za-z0-9._~+/=-]*$ ]] || die "HF_TOKEN: has characters that no token has"

# ---- one request

# The token goes to curl through a pipe, not as an argument that others could see. curl drops
# an Authorization header when a redirect leads to another server (since 7.58).
authorization() {
  [ -z "$token" ] || printf 'header = "Authorization: Bearer %s"\n' "$token"
}

# request URL SECONDS KIB [curl options]: sets reply (the body, if no --output) and http_code;
# returns curl's exit status. Neither the answer nor the file that is written grows beyond KIB.
request() {
  local url=$1 seconds=$2 most=$3 status=0 out
  shift 3
  out=$(
    trap '' XFSZ # writing beyond the limit is an error, not the end
    ulimit -f "$most" 2>/dev/null || :
    authorization | curl --config - --fail --location --max-redirs 10 --max-time "$seconds" \
      --proto "$protocols" --connect-timeout 20 --speed-limit 1 --speed-time 60 \
      --globoff --write-out '\n%{http_code}' "$@" -- "$url" | head -c $((most * 1024)) |
      tr -d '\0'
  ) || status=$?
  reply=${out%$'\n'*}
  http_code=${out##*$'\n'}
  return "$status"
}

# Is it worth another try? $1: curl's exit status.
transient() {
  case $1 in
    5 | 6 | 7 | 16 | 18 | 28 | 35 | 52 | 55 | 56 | 92 | 95) return 0 ;; # the network
    22) [[ $http_code =~ ^(408|429|5..)$ ]] ;;
    *) return 1 ;;
  esac
}

# explain STATUS WHAT: ends with the reason in one line.
explain() {
  local status=$1 what=$2 hint="set HF_TOKEN"
  [ "$status" -eq 22 ] || die "$what: $endpoint: $(reason "$status")"
  [ -z "$token" ] || hint="the token given does not open it"
  case $http_code in
    401) die "$what: no such model, or a private or gated one: $hint (HTTP 401)" ;;
    403) die "$what: a gated model, accept its terms on $endpoint/$repo: $hint (HTTP 403)" ;;
    404) die "$what: not found on $endpoint (HTTP 404)" ;;
    *) die "$what: $endpoint answered HTTP $http_code" ;;
  esac
}

reason() { # of curl's exit status
  case $1 in
    1) echo "redirected to an insecure address" ;;
    5 | 6) echo "host not found" ;;
    7) echo "no connection" ;;
    18 | 52 | 56 | 92 | 95) echo "the connection broke" ;;
    28) echo "timed out" ;;
    35 | 51 | 58 | 60 | 77) echo "no trusted TLS connection (curl $1)" ;;
    47) echo "redirected in circles" ;;
    *) echo "curl failed with status $1" ;;
  esac
}

pause() { sleep $((first_delay << ($1 - 1))); } # before the attempt after the $1-th

# ---- the Hub's list of files

# list REPO REVISION: sets listing (JSON), repo and commit for the functions below.
list() {
  repo=$1
  local what=$1 attempt status url
  [ "$2" = main ] || what=$1@$2
  url="$endpoint/api/models/$repo/revision/${2//\//%2F}?blobs=true"
  for ((attempt = 1; ; attempt++)); do
    status=0
    request "$url" 120 16384 --silent || status=$?
    [ "$status" -ne 0 ] || break
    { [ "$attempt" -lt "$tries" ] && transient "$status"; } || explain "$status" "$what"
    pause "$attempt"
  done
  listing=$reply
  commit=$(jq -er '.sha | strings' <<<"$listing" 2>/dev/null) || commit=
  [[ $commit =~ ^[0-9a-f]{40}$ ]] || die "$what: $endpoint does not answer as the Hub does"
}

has() {
  jq -e --arg name "$1" 'any(.siblings[]?; .rfilename == $name)' <<<"$listing" >/dev/null
}

# facts NAME: prints its size, the kind of checksum and the checksum.
facts() {
  jq -r --arg name "$1" '.siblings[] | select(.rfilename == $name)
    | if .lfs then "\(.lfs.size) sha256 \(.lfs.sha256)" else "\(.size) git \(.blobId)" end' \
    <<<"$listing" | head -n 1
}

# ---- one file

bytes() { if [ -f "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }

checksum() { # KIND FILE
  case $1 in
    sha256) sha256 <"$2" ;;
    git) { printf 'blob %s\0' "$(bytes "$2")"; cat "$2"; } | sha1 ;;
  esac
}

# fill PART NAME SIZE: download until PART has SIZE bytes, from where it stands.
fill() {
  local part=$1 name=$2 size=$3 have best=-1 attempt=0 status=0 free
  local deadline=$((SECONDS + patience + size / 100000))
  local url=$endpoint/$repo/resolve/$commit/$name progress=--silent
  [ ! -t 2 ] || progress=--progress-bar
  : 2>/dev/null >>"$part" || die "$part: cannot be written"
  while :; do
    have=$(bytes "$part")
    if [ "$have" -gt "$size" ]; then
      rm -f "$part"
      [ "$best" -lt 0 ] || die "$repo: $name: expected $size bytes, found more"
      have=0
    fi
    [ "$have" -ne "$size" ] || return 0
    [ "$SECONDS" -lt "$deadline" ] || die "$repo: $name: too slow: expected $size bytes in" \
      "$((patience + size / 100000)) seconds, found $have: call again to go on"
    if [ "$have" -gt "$best" ]; then # progress: patience starts anew
      best=$have
      attempt=0
    fi
    [ "$attempt" -lt "$tries" ] || break
    [ "$attempt" -eq 0 ] || pause "$attempt"
    attempt=$((attempt + 1))
    free=$(df -Pk "$dir" | awk 'NR == 2 { print $4 }')
    ! [[ $free =~ ^[0-9]+$ ]] || [ $(((size - have) / 1024)) -le "$free" ] ||
      die "$dir: no room for $name: needs $((size - have)) bytes, has $((free * 1024))"
    status=0
    request "$url" "$((deadline - SECONDS))" "$((size / 1024 + 1))" "$progress" \
      --output "$part" --continue-at - || status=$?
    case $status:$http_code in
      0:*) ;;
      33:* | 22:416) rm -f "$part" ;; # the server cannot go on from here: from the start
      23:*) [ "$(bytes "$part")" -gt "$size" ] || die "$part: cannot be written: is the disk full?" ;;
      *) transient "$status" || explain "$status" "$repo: $name" ;;
    esac
  done
  [ "$status" -ne 22 ] || explain "$status" "$repo: $name"
  die "$repo: $name: broke off $tries times: expected $size bytes, found $best"
}

# download NAME: from the listed repository into DIR, verified; a file that is there already
# and right is left alone.
download() {
  local name=$1 final=$dir/$1 part=$dir/$1.part size kind sum found resumed=no
  [ ! -d "$final" ] || die "$final: expected a file or nothing, found a folder"
  read -r size kind sum <<<"$(facts "$name")"
  [[ $size:$kind:$sum =~ ^[0-9]{1,16}:(sha256:[0-9a-f]{64}|git:[0-9a-f]{40})$ ]] ||
    die "$repo: $name: $endpoint gives no size and checksum"
  if [ "$(bytes "$final")" -eq "$size" ] && [ "$(checksum "$kind" "$final")" = "$sum" ]; then
    note "$name: already here"
    return
  fi
  note "$name: $size bytes"
  [ ! -s "$part" ] || resumed=yes
  while :; do
    fill "$part" "$name" "$size"
    found=$(checksum "$kind" "$part")
    [ "$found" != "$sum" ] || break
    rm -f "$part"
    [ "$resumed" = yes ] ||
      die "$repo: $name: wrong $kind checksum: expected $sum, found $found"
    note "$name: what was left of an earlier download does not fit: from the start"
    resumed=no
  done
  mv -f "$part" "$final" || die "$final: cannot be written"
}

# shards INDEX: the files that a downloaded index names.
shards() {
  local names name
  names=$(jq -er '.weight_map | [.[]] | unique | .[] | strings' "$dir/$1" 2>/dev/null) ||
    die "$repo: $1: expected a weight_map, found none"
  while read -r name; do
    [[ $name =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*\.(safetensors|bin)$ ]] ||
      die "$repo: $1: names a file that is not weights"
    has "$name" || die "$repo: $1: names $name, which is not there"
    printf '%s\n' "$name"
  done <<<"$names"
}

# ---- the model

main() {
  local weights name names
  list "$model" "$revision"
  has config.json || die "$model: has no config.json"
  for weights in model.safetensors model.safetensors.index.json \
    pytorch_model.bin pytorch_model.bin.index.json none; do
    ! has "$weights" || break
  done
  [ "$weights" != none ] || die "$model: has neither model.safetensors nor pytorch_model.bin"
  mkdir -p "$dir" 2>/dev/null || die "$dir: cannot be made"

  download config.json
  for name in generation_config.json tokenizer.json; do
    ! has "$name" || download "$name"
  done
  download "$weights"
  case $weights in
    *.index.json)
      names=$(shards "$weights")
      for name in $names; do download "$name"; done
      ;;
  esac
  if ! has tokenizer.json; then
    # Only the original layout has no model_type (and config.json need not be proper JSON).
    if grep -q '"model_type"' "$dir/config.json"; then
      note "$model: has no tokenizer.json: it can be run on token ids only"
    else
      list EleutherAI/gpt-neox-20b main
      download tokenizer.json
    fi
  fi
  printf '%s\n' "$dir"
}

trap 'exit 130' INT
main
