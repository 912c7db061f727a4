#!/bin/sh
# Flags for an emulator that tracks its guest's writes, chosen from what works on this machine:
#
#   --dirty-tracking=pagemap-scan|uffd-wp|copy   copy: compare with a copy, for nothing better works; the only flag then
#   --kernel-writes=direct|bounce                bounce: read(2) into guest memory may fail, read elsewhere and copy
#   --huge-pages=transparent,hugetlb|none        the kinds of huge pages that guest memory may be made of
#
# Install: beside the emulator's launcher. Change the names of the flags to your emulator's.
# Needs:   pagemapcompat in PATH, or its path in PAGEMAPCOMPAT; without it the answer is to copy.
# Usage:   . ./emulator-flags.sh && exec emulator $emulator_flags "$@"
#          exec emulator $(./emulator-flags.sh) "$@"
#
# Never fails. Sourced, it leaves behind emulator_flags and one function, and no option, trap or other variable is
# changed. Standard error says why it has come to copying.

pagemapcompat_flags() (
    set +eu # of the launcher: here every failure has an answer
    program=${PAGEMAPCOMPAT:-pagemapcompat}
    unset PAGEMAPCOMPAT_BACKEND PAGEMAPCOMPAT_GUARANTEES PAGEMAPCOMPAT_FEATURE_UFFD_WP_HUGETLB \
        PAGEMAPCOMPAT_LIMIT_TRANSPARENT_HUGEPAGE PAGEMAPCOMPAT_LIMIT_HUGE_PAGE_SIZES

    copy() {
        printf 'emulator-flags: copying: %s\n' "$1" >&2
        echo --dirty-tracking=copy
        exit 0
    }

    command -v "$program" >/dev/null || copy "$program is not installed, or not in PATH"
    answer=$("$program" probe --format env) || copy "$program probe ended with $?"

    # Evaluated is what assigns one plain or quoted word to a name of its own, and nothing else.
    names='(BACKEND|GUARANTEES|(BACKEND|FEATURE|LIMIT)_[A-Z0-9_]+)'
    eval "$(printf '%s\n' "$answer" | LC_ALL=C grep -E "^PAGEMAPCOMPAT_$names=([A-Za-z0-9_@%+=:,./-]*|'[^']*')\$")"

    case ${PAGEMAPCOMPAT_BACKEND-} in
    pagemap-scan | uffd-wp) ;;
    none)
        "$program" probe --require pagemap-scan uffd-wp >/dev/null # says why of each
        copy "no backend works here"
        ;;
    *) copy "$program probe names no backend that is known here" ;;
    esac

    case " ${PAGEMAPCOMPAT_GUARANTEES-} " in
    *" KERNEL_WRITES "*) writes=direct ;;
    *) writes=bounce ;;
    esac

    huge=
    case ${PAGEMAPCOMPAT_LIMIT_TRANSPARENT_HUGEPAGE-} in
    always | madvise) huge=transparent ;;
    esac
    if [ "${PAGEMAPCOMPAT_FEATURE_UFFD_WP_HUGETLB-}" = yes ] && [ -n "${PAGEMAPCOMPAT_LIMIT_HUGE_PAGE_SIZES-}" ]; then
        huge=${huge:+$huge,}hugetlb
    fi

    echo "--dirty-tracking=$PAGEMAPCOMPAT_BACKEND --kernel-writes=$writes --huge-pages=${huge:-none}"
)

emulator_flags=$(pagemapcompat_flags)

case ${0##*/} in
emulator-flags.sh) printf '%s\n' "$emulator_flags" ;; # run, not sourced
esac
