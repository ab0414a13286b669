//! A namespace of mounts of a test's own.

/// For the shell in a new namespace: leaves the mounts behind that other tests had at that moment. The copies would keep their devices in use. `$KEEP` stays.
pub const LEAVE_OTHERS: &str = r#"
awk '{ for (i = 7; i <= NF; i++) if ($i == "-") { type = $(i + 1); source = $(i + 2) }
       if ($5 != "/" && $5 != ENVIRON["KEEP"] && (source ~ "^/dev/loop" || type ~ "^fuse")) print $5 }' /proc/self/mountinfo |
while read -r at; do umount -l "$(printf %b "$at")" || true; done
"#;
