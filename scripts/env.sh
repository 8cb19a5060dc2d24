# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=bash
#
# Sourced by the other scripts: where things are and which tools build the
# kernel side.  Everything can be overridden from the environment.

DUNE_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DUNE_CACHE=${DUNE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dune}
DUNE_LINUX=${DUNE_LINUX:-6.12}
JOBS=${JOBS:-$(nproc)}

# The kernel wants the distribution's rustc, because that one has its library
# source (rust-src) beside it.  User space takes the first cargo on PATH.
KRUSTC=${KRUSTC:-/usr/bin/rustc}
KRUSTDOC=${KRUSTDOC:-/usr/bin/rustdoc}
KCLIPPY=${KCLIPPY:-${KRUSTC%/*}/clippy-driver}
KBINDGEN=${KBINDGEN:-$DUNE_CACHE/tools/bin/bindgen}

# The newest LLVM that has libclang (a directory may hold libclang-cpp only).
if [ -z "${LIBCLANG_PATH:-}" ]; then
    LIBCLANG_PATH=$(find /usr/lib/llvm-*/lib -maxdepth 1 \( -name 'libclang.so*' -o -name 'libclang-[0-9]*.so*' \) -printf '%h\n' \
        2>/dev/null | sort -V | tail -n 1) || LIBCLANG_PATH=
fi
export LIBCLANG_PATH DUNE_CACHE

# For a kernel that setup did not build: where there is no such file, the program of that name on PATH.
take_tools_on_path() {
    [ -x "$KRUSTC" ] || KRUSTC=$(command -v rustc) || KRUSTC=rustc
    [ -x "$KRUSTDOC" ] || KRUSTDOC=$(command -v rustdoc) || KRUSTDOC=rustdoc
    [ -x "$KBINDGEN" ] || KBINDGEN=$(command -v bindgen) || KBINDGEN=bindgen
}

# Whether this is root by sudo, who has neither the cargo nor the bindgen of the user.
is_under_sudo() { [ "$(id -u)" = 0 ] && [ -n "${SUDO_USER:-}" ] && [ "$SUDO_USER" != root ]; }

die() {
    echo "${0##*/}: $*" >&2
    exit 1
}

# usage: kernel_cc_args NAME; the make arguments that choose the C compiler of
# the kernel NAME (6.12 allows Rust with KASAN only under clang) and then what
# it leaves out: KASAN does not watch lockdep's own tables nor the frames that
# the unwinder reads, which were a third of all that the kernel debug executed.
kernel_cc_args() {
    case $1 in
    debug) echo "LLVM=-${DUNE_LLVM:-19} KASAN_SANITIZE_lockdep.o=n KASAN_SANITIZE_unwind_frame.o=n" ;;
    esac
}

# usage: with_progress LABEL LOGFILE COMMAND...; one line every 15 s (or a
# counter in place on a terminal) while COMMAND writes into LOGFILE. Says
# nothing of one that succeeds within five seconds.
with_progress() {
    local label=$1 log=$2 start=$SECONDS pid rc=0 n=0
    shift 2
    "$@" >"$log" 2>&1 </dev/null &
    pid=$!
    # shellcheck disable=SC2064
    trap "kill $pid 2>/dev/null" INT TERM
    while kill -0 "$pid" 2>/dev/null; do
        sleep 1
        n=$((n + 1))
        if [ -t 2 ]; then
            printf '\r%s: %4d s, %d lines of log' "$label" $((SECONDS - start)) "$(wc -l <"$log")" >&2
        elif [ $((n % 15)) = 0 ]; then
            printf '%s: %d s, %d lines of log\n' "$label" $((SECONDS - start)) "$(wc -l <"$log")" >&2
        fi
    done
    wait "$pid" || rc=$?
    trap - INT TERM
    [ ! -t 2 ] || printf '\r\033[K' >&2
    [ $rc != 0 ] || [ $((SECONDS - start)) -ge 5 ] || return 0
    printf '%s: %s after %d s\n' "$label" "$([ $rc = 0 ] && echo done || echo "FAILED ($log)")" $((SECONDS - start)) >&2
    return $rc
}
