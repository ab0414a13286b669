//! The counts that layers and bases keep of the data they show, against what the block maps say.

use super::Check;
use crate::error::Result;
use crate::store::Below;

impl Check<'_> {
    /// Counts anew. What is not known is no finding: then it is counted when somebody asks.
    pub(super) fn counts(&mut self, among: &dyn Fn(Below) -> bool) -> Result<()> {
        for found in self.store.recount(among)? {
            let Some(kept) = found.kept.filter(|kept| *kept != found.counted) else {
                continue;
            };
            let mut finding = self.about(
                found.below,
                format!(
                    "it says that it shows {kept} blocks of data, and shows {}; `forkdisk check --repair` corrects that",
                    found.counted
                ),
            );
            // Nobody sees anything of it but in `du`.
            finding.affected.clear();
            self.report.corruptions.push(finding);
        }
        Ok(())
    }
}
