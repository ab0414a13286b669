//! Loop devices that have another size than their disk: whoever made it larger, or rolled it back, died before he could tell the device.
//!
//! Always true: the server itself never tells a device its size. That waits for requests on the served file, and a process that waits for itself
//! cannot even be killed. So another process does it; if that has to wait, it waits for whoever serves then.

use super::keeper::own_command;
use super::protocol::text;
use super::server::Server;
use crate::error::Result;
use crate::store::ObjectKind;
use crate::sys::loopdev;
use serde_json::Value;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

/// The hidden command of that process.
pub const FIT_COMMAND: &str = "fit";

impl Server {
    /// The size of an attached disk, told to the kernel once more, for whoever tells the device.
    pub(super) fn fit(&self, request: &Value) -> Result<Value> {
        let disk = text(request, "disk")?;
        let (open, _) = self.open_disk(disk)?;
        self.tell_size(disk, &open)
    }
    /// Disks whose device has another size.
    fn unfit(&self) -> Vec<String> {
        let table = self.table.lock();
        let unfit = table.values().filter(|entry| {
            let a = &entry.attached;
            let device = a.device.as_deref().map(Path::new);
            let size = device.and_then(loopdev::size);
            a.kind == ObjectKind::Disk && size.is_some_and(|size| size != a.size)
        });
        unfit.map(|entry| entry.attached.name.clone()).collect()
    }
    /// Has the devices corrected that have another size than their disk. Returns at once.
    pub(super) fn fit_devices(self: &Arc<Server>) {
        let server = self.clone();
        let work = move || {
            for name in server.unfit() {
                tracing::warn!(disk = name, "its device has another size: it is told");
                let store = server.store.path();
                let told = own_command(store, FIT_COMMAND).and_then(|mut command| {
                    let command = command
                        .arg(&name)
                        .stdout(Stdio::null())
                        .stderr(Stdio::null());
                    let child = command.status();
                    child.map_err(|e| crate::error::Error::io("run", "forkdisk", &e))
                });
                match told {
                    Ok(status) if status.success() => {}
                    Ok(status) => tracing::error!(disk = name, "its device was not told: {status}"),
                    Err(e) => tracing::error!(disk = name, "its device was not told: {e}"),
                }
            }
        };
        if let Err(e) = std::thread::Builder::new().name("fit".into()).spawn(work) {
            tracing::warn!("cannot start a thread: {e}");
        }
    }
    /// A conversation ended. If a disk got another size meanwhile, its device should have it by now.
    pub(super) fn fit_after(self: &Arc<Server>) {
        if self.resized.swap(false, SeqCst) {
            self.fit_devices();
        }
    }
}
