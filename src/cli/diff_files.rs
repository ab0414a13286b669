//! Which files differ between two states: `diff --files`.

use crate::{
    attach::files::ChangedFile,
    cli::{
        Stop,
        context::Context,
        diff::{Diff, MAX_KEPT, Silent, each},
        states::Looked,
    },
    daemon::files::changed_files,
    error::{Error, Kind},
    store::{Object, Store},
    sys::signals,
};
use serde_json::json;
use std::{
    io::{self, BufWriter, Write},
    ops::Range,
};

/// Shows the files to which what differs belongs. Is there a difference?
pub(super) fn run(
    diff: &Diff,
    context: &Context,
    store: &Store,
    lower: &Object,
    upper: &Object,
) -> Result<bool, Stop> {
    let (below, above) = (
        Looked::at(context, store, lower)?,
        Looked::at(context, store, upper)?,
    );
    for (looked, object) in [(&below, lower), (&above, upper)] {
        if looked.live() {
            let name = &object.name;
            return Err(Error::new(
                Kind::Busy,
                format!("{name} is attached for writing: its files cannot be looked at"),
            )
            .hint(format!(
                "`forkdisk snapshot {name}@NAME` keeps the state of a disk that is in use: compare that"
            ))
            .into());
        }
    }
    signals::catch();
    let mut ranges: Vec<Range<u64>> = Vec::new();
    each(below.state(), above.state(), &Silent, |change| {
        let end = change.at + change.len;
        let full = ranges.len() == MAX_KEPT;
        match ranges.last_mut() {
            Some(last) if last.end == change.at => last.end = end,
            _ if full => {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!("more than {MAX_KEPT} ranges differ"),
                )
                .hint("compare states that are closer to each other; without --files any number is shown")
                .into());
            }
            _ => ranges.push(change.at..end),
        }
        Ok(())
    })?;
    let changed: u64 = ranges.iter().map(|r| r.end - r.start).sum();
    let differ = changed > 0 || below.state().size() != above.state().size();
    drop((below, above));
    let ui = &context.ui;
    let mut out = BufWriter::new(io::stdout());
    // Why writing ended, if it did: what walks the trees knows errors of its own only.
    let mut stopped: Option<io::Error> = None;
    // A document is shown when all of it is known.
    let mut documents = Vec::new();
    let mut write = |text: String| -> crate::error::Result<()> {
        out.write_all(text.as_bytes()).map_err(|e| {
            let error = Error::io("write to", "standard output", &e);
            stopped = Some(e);
            error
        })
    };
    let mut one = |file: ChangedFile| {
        let ChangedFile {
            path,
            change,
            kind,
            bytes,
        } = file;
        if ui.json {
            documents.push(json!({
                "path": path.to_string_lossy(), "change": change.word(), "kind": kind.to_string(), "bytes": bytes,
            }));
            return Ok(());
        }
        let text = if diff.no_header {
            format!("{}\t{kind}\t{bytes}\t{}\n", change.word(), plain(&path))
        } else {
            let size = ui.size(bytes);
            format!("{:<8} {kind} {size:>10}  {}\n", change.word(), plain(&path))
        };
        write(text)
    };
    let summary = changed_files(store, upper, lower, &ranges, &signals::caught, &mut one);
    if let Some(e) = stopped {
        return Err(Stop::output(&e));
    }
    let summary = summary?;
    if ui.json {
        ui.document(json!({
            "from": lower.name, "to": upper.name, "files": documents, "fs_type": summary.fs_type, "metadata": summary.metadata,
            "changed": changed, "without_journal": summary.without_journal, "differ": differ,
        }))?;
        return Ok(differ);
    }
    let end = match diff.no_header {
        true => format!("metadata\t-\t{}\t-\n", summary.metadata),
        false => format!("{:<8} - {:>10}\n", "metadata", ui.size(summary.metadata)),
    };
    let written = out.write_all(end.as_bytes()).and_then(|()| out.flush());
    written.map_err(|e| Stop::output(&e))?;
    if summary.without_journal {
        ui.warn("a journal was not replayed: the latest changes may not be seen as files (of snapshots with --freeze none are missing; XFS has a journal to replay all the same)");
    }
    Ok(differ)
}

/// A path in one line, whatever its name holds.
fn plain(path: &std::path::Path) -> String {
    path.to_string_lossy()
        .chars()
        .flat_map(|c| match c.is_control() {
            true => c.escape_default().collect::<Vec<_>>(),
            false => vec![c],
        })
        .collect()
}
