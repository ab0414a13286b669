//! What must be durable before the first commit of a layer is.

use crate::io::Dir;
use crate::sync::Mutex;
use std::sync::Arc;

/// A directory in which something was said of a layer that is not durable yet.
#[derive(Default)]
pub struct Unsettled(Mutex<Option<Arc<dyn Dir>>>);

impl Unsettled {
    /// From now on there is something.
    pub(super) fn rest_on(&self, names: Arc<dyn Dir>) {
        *self.0.lock() = Some(names);
    }
    /// Makes it durable; waits if somebody else is doing so.
    pub fn settle(&self) {
        let mut names = self.0.lock();
        if let Some(names) = names.take()
            && let Err(e) = names.sync()
        {
            // It says that the layer was opened, for whoever finds it damaged. No data depends on it.
            tracing::debug!("cannot note that a layer was opened: {e}");
        }
    }
}
