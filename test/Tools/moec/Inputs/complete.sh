# Prints what the bash completion of moec ($1) offers for some beginnings of commands.
. "$1"
try() {
  COMP_WORDS=("$@")
  COMP_CWORD=$(($# - 1))
  COMPREPLY=()
  _moec
  local line="$*"
  echo "${line// = /=}: ${COMPREPLY[*]}"
}
cd "$(mktemp -d)" || exit 1
try moec com
try moec compile --em
try moec compile --emit l
try moec compile --emit = ar
try moec inspect --us
try moec compile --log j
try moec completion z
