//! The report as a page.

use crate::bench::Report;

/// The page: one file that needs no other.
pub fn page(report: &Report, date: &str) -> String {
    format!("{} {date}", report.command)
}
