//! The memory cgroup of this process.

use std::fs;
use std::path::{Path, PathBuf};

/// Where a hierarchy is mounted, what its limit is called, and the words for none.
const HIERARCHIES: [(&str, &str, &str); 2] = [
    ("/sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes"),
    ("/sys/fs/cgroup", "", "memory.max"),
];

/// From here on a limit of version 1 is none: it is counted in pages, and rounded.
const NONE: u64 = 1 << 62;

/// The path of this process in the hierarchy of `controller` ("" is the unified one).
fn path_in(own: &str, controller: &str) -> Option<PathBuf> {
    own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let controllers = fields.next()?;
        let path = fields.next()?;
        let found = match controller {
            "" => controllers.is_empty(),
            _ => controllers.split(',').any(|c| c == controller),
        };
        found.then(|| path.trim_start_matches('/').into())
    })
}

fn is_limited(group: &Path, limit: &str) -> Option<bool> {
    let text = fs::read_to_string(group.join(limit)).ok()?;
    Some(text.trim().parse::<u64>().is_ok_and(|n| n < NONE))
}

/// If the memory of this process is limited with that of others, moves it up to the next group that is not, as far as it may. Returns the group
/// that it left.
///
/// For a daemon that a command starts: it serves the whole machine, and must neither end with the group of whoever was first to need it, nor
/// wait for memory that only it can free.
pub fn leave_limited_memory() -> Option<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    for (mounted, controller, limit) in HIERARCHIES {
        let Some(path) = path_in(&own, controller) else {
            continue;
        };
        let root = Path::new(mounted);
        let group = root.join(&path);
        if is_limited(&group, limit) != Some(true) {
            continue;
        }
        let ancestors = group
            .ancestors()
            .skip(1)
            .take_while(|g| g.starts_with(root));
        for ancestor in ancestors {
            // The root of the unified hierarchy has no such file, and no limit.
            if is_limited(ancestor, limit) == Some(true) {
                continue;
            }
            let pid = std::process::id().to_string();
            if fs::write(ancestor.join("cgroup.procs"), pid).is_ok() {
                return Some(group);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_in_either_hierarchy() {
        let old = "9:name=systemd:/\n4:memory:/a/b\n1:cpu,cpuacct:/c\n0::/\n";
        assert_eq!(path_in(old, "memory"), Some("a/b".into()));
        assert_eq!(path_in(old, "cpuacct"), Some("c".into()));
        assert_eq!(path_in(old, ""), Some("".into()));
        let new = "0::/user.slice/x:y\n";
        assert_eq!(path_in(new, "memory"), None);
        assert_eq!(path_in(new, ""), Some("user.slice/x:y".into()));
    }
}
