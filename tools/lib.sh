# shellcheck shell=bash disable=SC2034  # the sourcing script uses what is set here
# Shared by the tools: sourced, not run.

# Where we are, whatever the caller's directory is.
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
started=$SECONDS

if [[ -t 1 && -z ${NO_COLOR:-} && ${TERM:-dumb} != dumb ]]; then
    bold=$'\e[1m' red=$'\e[31m' green=$'\e[32m' dim=$'\e[2m' plain=$'\e[0m'
else
    bold='' red='' green='' dim='' plain=''
fi

# A heading, with the time since the start.
step() {
    printf '\n%s== %s%s %s(%d s)%s\n' "$bold" "$*" "$plain" "$dim" $((SECONDS - started)) "$plain"
}

# A remark.
note() {
    printf '   %s\n' "$*"
}

# Something that was shown to be so.
good() {
    printf '   %sok%s  %s\n' "$green" "$plain" "$*"
}

# The end: what is wrong, and what to do.
die() {
    printf '%serror:%s %s\n' "$red" "$plain" "$1" >&2
    if (($# > 1)); then
        printf '  hint: %s\n' "$2" >&2
    fi
    exit 1
}

# need COMMAND:PACKAGE... : installs the Debian packages of the commands that are missing. Fails if it cannot.
need() {
    local pair missing=()
    for pair; do
        PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
    done
    ((${#missing[@]})) || return 0
    note "installing ${missing[*]}"
    if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
        printf '%serror:%s these packages are missing: %s\n' "$red" "$plain" "${missing[*]}" >&2
        return 1
    fi
    local apt=(apt-get -qq -o Acquire::Retries=2 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=120)
    {
        # What is known of the mirror may be old, or nothing: then it is asked.
        DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y --no-install-recommends "${missing[@]}" ||
            { "${apt[@]}" update &&
                DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y --no-install-recommends "${missing[@]}"; }
    } >/dev/null </dev/null
}

# Finds cargo, also where the login shell has not put it on the path.
need_cargo() {
    local dir
    for dir in "${CARGO_HOME:-$HOME/.cargo}/bin" /usr/local/cargo/bin; do
        command -v cargo >/dev/null || PATH=$dir:$PATH
    done
    command -v cargo >/dev/null || die "there is no cargo" "install Rust: https://rustup.rs"
    need cc:gcc ld:binutils || die "there is no linker" "apt-get install gcc"
}

# Devices and mounts need the modules; in a container they may be built in, or not for us.
need_devices() {
    modprobe -q -a fuse loop 2>/dev/null || true
    [[ -c /dev/fuse ]] || die "/dev/fuse is missing" "modprobe fuse; in a container: --device /dev/fuse"
    [[ -c /dev/loop-control ]] || die "/dev/loop-control is missing" "modprobe loop"
}

# Mount points at or below the directory $1, the newest first.
mounts_below() {
    local dir=$1 fields mount
    while read -r -a fields; do
        # The kernel writes a space as \040.
        printf -v mount '%b' "${fields[4]//\\/\\0}"
        [[ $mount == "$dir" || $mount == "$dir"/* ]] && printf '%s\n' "$mount"
    done </proc/self/mountinfo | tac
}

# Loop devices whose file is below the directory $1.
loops_below() {
    local dir=$1 backing file
    for backing in /sys/block/loop*/loop/backing_file; do
        # A device may go away while we look.
        file=$(cat "$backing" 2>/dev/null) || continue
        if [[ $file == "$dir"/* ]]; then
            backing=${backing#/sys/block/}
            printf '/dev/%s\n' "${backing%%/*}"
        fi
    done
}

# run_survival TEST NAME=VALUE... : one test of tests/e2e/survive.rs in the release build, as root, with these variables. Prints its figures; only
# them if $json is set.
run_survival() {
    local test=$1 figures log code=0
    shift
    ((EUID == 0)) || die "this needs root" "sudo ${0}"
    {
        need_cargo
        need mkfs.ext4:e2fsprogs fio:fio sqlite3:sqlite3 losetup:mount || die "packages could not be installed" "see above"
        need_devices
        # The programs that run are those that were built: the suite of tests never runs this at the same time.
        cargo build --release --locked --quiet --bin forkdisk
        cargo test --release --locked --quiet --test e2e --no-run
    } >&2
    figures=$(mktemp) log=$(mktemp)
    env FORKDISK_FIGURES="$figures" "$@" cargo test --release --locked --quiet --test e2e "$test" >"$log" 2>&1 </dev/null || code=$?
    if ((code)); then
        cat "$log" >&2
    elif [[ -n ${json:-} ]]; then
        cat "$figures"
    else
        tr -d '{}"' <"$figures" | tr ',' '\n' | sed 's/^/   /; s/:/: /'
        good "$test: nothing lost, nothing wrong, in $((SECONDS - started)) s"
    fi
    rm -f "$figures" "$log"
    return "$code"
}
