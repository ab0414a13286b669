//! The counts that layers and bases keep of the data they show, against what the block maps say.

use super::Check;
use crate::error::Result;
use crate::store::{Below, Recount};
use std::collections::HashSet;

impl Check<'_> {
    /// Counts anew. What is not known is no finding: then it is counted when somebody asks. `check --repair` notes what was counted in either case.
    pub(super) fn counts(&mut self, among: &dyn Fn(Below) -> bool) -> Result<()> {
        let all = self.store.recount(among)?;
        let differs = |found: &&Recount| found.kept.is_some_and(|kept| kept != found.counted);
        // Where an image has other holes than when it was counted (it was copied, or put back from a backup), nothing is wrong with what stands
        // on it: its zeros are the same.
        let moved: HashSet<Below> = all
            .iter()
            .filter(differs)
            .map(|found| found.below)
            .filter(|below| matches!(below, Below::Base(_)))
            .collect();
        for found in all {
            if moved.contains(&Below::Base(found.over)) {
                continue;
            }
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
