//! One object, closely: `info`, `du`, `map`.

use crate::{
    cli::{
        Outcome, Stop,
        context::Context,
        list::paths,
        names::Names,
        render::{
            json::{DamageDoc, ObjectDoc, SCHEMA, UsageDoc},
            table::{Align, Table},
            time,
        },
        resize::on_full,
        states::{Looked, look},
        store::counted,
    },
    disk::{Disk, Extent, Source},
    error::{Kind, Result},
    format::stream::Digest,
    store::{Below, Details, Effort, Found, Object, Space, Store, Usage},
    sys::signals,
    units::{BLOCK, REGION_BYTES},
};
use clap::Args;
use serde::Serialize;
use std::{
    io::{self, BufWriter, Write},
    path::PathBuf,
};

/// Tell all about a disk, snapshot or image
#[derive(Args, Debug)]
pub(crate) struct Info {
    /// What to tell about
    #[arg(value_name = "REF")]
    reference: String,
    /// Compute the digest of a base of any size, not only up to 16 GiB
    #[arg(long)]
    digest: bool,
}

#[derive(Serialize)]
struct InfoDoc {
    #[serde(flatten)]
    object: ObjectDoc,
    state: &'static str,
    base: String,
    base_id: String,
    base_file: PathBuf,
    base_length: u64,
    base_linked: bool,
    base_sums: bool,
    base_digest: Option<String>,
    digest: Option<String>,
    known_as: Option<String>,
    same_as: Vec<String>,
    depth: u32,
    chain: Vec<LinkDoc>,
    private_bytes: u64,
    zero_blocks: u64,
    quota: Option<u64>,
    on_full: Option<&'static str>,
    quota_used: Option<u64>,
    allocated: u64,
    refer: u64,
    exclusive: u64,
    shared: u64,
    /// Seconds.
    history_window: Option<u64>,
    /// Bytes.
    history_limit: Option<u64>,
    history_bytes: u64,
    attached: bool,
    device: Option<String>,
    file: Option<PathBuf>,
    read_only: Option<bool>,
    mounts: Vec<PathBuf>,
}

#[derive(Serialize)]
struct LinkDoc {
    kind: &'static str,
    id: String,
    names: Vec<String>,
}

impl Info {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let store = context.open()?;
        let details = store.with_object(&self.reference, |object| store.details(object))?;
        let object = details.object.clone();
        let (digest, same_as) = self.digest(context, &store, &object)?;
        let names = Names::from_ids(&details.names);
        let all = context.attached_for_show(&store).into_iter();
        let mut of_this = all.filter(|(a, _)| a.id == object.id);
        let (attached, mounts) = of_this.next().unzip();
        let mounts = mounts.unwrap_or_default();
        let quota = context.quota_of(&store, &object, attached.is_some());
        let (limits, history_bytes) = store.history_space(&object)?;
        let base = &details.base;
        let link = |below: &Below| LinkDoc {
            kind: match below {
                Below::Base(_) => "base",
                Below::Layer(_) => "layer",
            },
            id: below.id().to_string(),
            names: names.all(below.id()).to_vec(),
        };
        // What has no name has no record that could tell.
        let elsewhere = store.known_elsewhere(&object).ok().flatten();
        let document = InfoDoc {
            object: ObjectDoc::new(&object, &names),
            state: details.state,
            base: names
                .first(base.id)
                .map_or(base.id.to_string(), str::to_string),
            base_id: base.id.to_string(),
            base_file: base.path.clone(),
            base_length: base.len,
            base_linked: base.link.is_some(),
            base_sums: base.sums,
            base_digest: base.digest.clone(),
            digest: digest.map(|digest| digest.to_string()),
            known_as: elsewhere.map(|digest| digest.to_string()),
            same_as,
            depth: details.depth,
            chain: details.chain.iter().map(link).collect(),
            private_bytes: details.private_bytes,
            zero_blocks: details.zero_blocks,
            quota: quota.and_then(|q| q.quota),
            on_full: quota.and_then(|q| on_full(&q)),
            quota_used: quota.map(|q| q.used),
            allocated: details.allocated,
            refer: details.usage.refer,
            exclusive: details.usage.exclusive,
            shared: details.usage.shared,
            history_window: limits.and_then(|l| l.window),
            history_limit: limits.and_then(|l| l.bytes),
            history_bytes,
            attached: attached.is_some(),
            device: attached.as_ref().and_then(|a| a.device.clone()),
            file: attached.as_ref().map(|a| a.file.clone()),
            read_only: attached.as_ref().map(|a| a.read_only),
            mounts,
        };
        if ui.json {
            return ui.document(document);
        }
        ui.data(info_text(context, &details, &document, &names))
    }
    /// The digest of what is sealed, and who else has it. What is damaged has none; all else about it can be told.
    fn digest(
        &self,
        context: &Context,
        store: &Store,
        object: &Object,
    ) -> Result<(Option<Digest>, Vec<String>)> {
        let effort = match self.digest {
            true => Effort::ANY,
            false => Effort::USUAL,
        };
        signals::catch();
        let label = format!("computing the digest of {}", object.name);
        let progress = context.ui.progress(&label);
        let digest = store.digest(object, effort.unkept(context.dry_run), &*progress);
        drop(progress);
        match digest {
            Ok(None) => Ok((None, Vec::new())),
            Ok(Some(digest)) => Ok((Some(digest), store.same_as(object, digest)?)),
            Err(e) if e.kind() == Kind::Interrupted => Err(e),
            Err(e) => {
                context
                    .ui
                    .warn(format_args!("its digest cannot be computed: {e}"));
                Ok((None, Vec::new()))
            }
        }
    }
}

fn info_text(context: &Context, details: &Details, document: &InfoDoc, names: &Names) -> String {
    let ui = &context.ui;
    let object = &details.object;
    let exact = |bytes: u64| match ui.size(bytes) {
        shown if shown.ends_with(" B") => shown,
        shown => format!("{shown} ({bytes} bytes)"),
    };
    let created = match object.created {
        // A base without a name: nobody noted it.
        0 => "-".to_string(),
        at => format!("{} ({})", time::date_time(at), time::ago(at, time::now())),
    };
    let chain: Vec<String> = details.chain.iter().map(|b| names.show(b.id())).collect();
    let mut rows = vec![
        ("name", object.name.clone()),
        ("kind", object.word().to_string()),
        ("id", object.id.to_string()),
        ("size", exact(object.size)),
        ("created", created),
        ("message", object.message.clone().unwrap_or_default()),
    ];
    if object.parent.is_some() {
        let zeros = details.zero_blocks * BLOCK;
        let used = exact(document.quota_used.unwrap_or_default());
        let quota = match (document.quota, document.on_full) {
            (Some(quota), Some("pause")) => {
                format!("{used} of {}, then writers wait", exact(quota))
            }
            (Some(quota), _) => format!("{used} of {}", exact(quota)),
            (None, _) => String::new(),
        };
        rows.extend([
            ("state", details.state.to_string()),
            ("depth", details.depth.to_string()),
            ("chain", chain.join(" > ")),
            ("private", exact(details.private_bytes)),
            (
                "zeros",
                if zeros > 0 {
                    exact(zeros)
                } else {
                    String::new()
                },
            ),
            ("quota", quota),
        ]);
    }
    rows.extend([
        ("allocated", exact(details.allocated)),
        ("refer", exact(details.usage.refer)),
        ("exclusive", exact(details.usage.exclusive)),
        ("shared", exact(details.usage.shared)),
        (
            "history",
            match document.history_bytes {
                0 => String::new(),
                bytes => exact(bytes),
            },
        ),
        ("base", names.show(details.base.id)),
        ("digest", document.digest.clone().unwrap_or_default()),
        ("known as", document.known_as.clone().unwrap_or_default()),
        ("same as", document.same_as.join(", ")),
        ("base file", document.base_file.display().to_string()),
        (
            "attached",
            match (&document.device, &document.file) {
                (Some(at), _) => at.clone(),
                (None, Some(at)) => at.display().to_string(),
                (None, None) => String::new(),
            },
        ),
        ("mounted on", paths(&document.mounts)),
    ]);
    let mut table = Table::new([(String::new(), Align::Left), (String::new(), Align::Left)]);
    for (name, value) in rows.into_iter().filter(|(_, value)| !value.is_empty()) {
        table.row(vec![name.to_string(), value]);
    }
    table.text(false)
}

/// Show the space that objects take, and what full copies would take
#[derive(Args, Debug)]
#[command(
    after_help = "SIZE: the virtual size. REFER: data reachable through it. EXCL: what would go with it alone (`rm -n` tells\n\
        what removing a snapshot in the middle would free). SHARED: what it refers to that others need, too."
)]
pub(crate) struct Du {
    /// What to look at [default: all]
    #[arg(value_name = "REF")]
    references: Vec<String>,
    /// For scripts: tabs between columns, no heading, no summary
    #[arg(short = 'H', long)]
    no_header: bool,
    /// Exact numbers: bytes
    #[arg(short, long)]
    parsable: bool,
}

#[derive(Serialize)]
struct DuDoc {
    /// The fields of the only object, if there is just one.
    #[serde(flatten)]
    only: Option<DuRowDoc>,
    objects: Vec<DuRowDoc>,
    total: TotalDoc,
    damaged: Vec<DamageDoc>,
}

#[derive(Clone, Serialize)]
struct DuRowDoc {
    name: String,
    kind: &'static str,
    id: String,
    #[serde(flatten)]
    usage: UsageDoc,
    /// Of `exclusive`: what a disk's history occupies.
    history_bytes: u64,
}

#[derive(Serialize)]
struct TotalDoc {
    /// Host bytes of all layers and bases that the objects stand on, each counted once.
    stored: u64,
    /// What the objects would take as full, sparse copies.
    full_copies: u64,
    /// Virtual bytes of all objects.
    size: u64,
}

impl Du {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let store = context.open()?;
        let Found {
            sound: objects,
            mut damaged,
        } = self.objects(&store)?;
        let Space {
            objects:
                Found {
                    sound: known,
                    damaged: more,
                },
            stored,
        } = store.space(objects)?;
        damaged.extend(more);
        if let ([only], false) = (&damaged[..], self.references.is_empty()) {
            return Err(only.error.clone().into());
        }
        let row = |(object, usage): &(Object, Usage)| DuRowDoc {
            name: object.name.clone(),
            kind: object.word(),
            id: object.id.to_string(),
            usage: (*usage).into(),
            // Who cannot tell has none that could be shown.
            history_bytes: store.history_space(object).map_or(0, |known| known.1),
        };
        let rows: Vec<DuRowDoc> = known.iter().map(row).collect();
        let total = TotalDoc {
            stored,
            full_copies: rows.iter().map(|row| row.usage.refer).sum(),
            size: rows.iter().map(|row| row.usage.size).sum(),
        };
        if ui.json {
            let only = match &rows[..] {
                [one] => Some(one.clone()),
                _ => None,
            };
            ui.document(DuDoc {
                only,
                objects: rows,
                total,
                damaged: DamageDoc::all(&damaged),
            })?;
            return ui.damage(&damaged);
        }
        if rows.is_empty() && !self.no_header {
            ui.talk("the store is empty");
            return ui.damage(&damaged);
        }
        let number = |name: &str| (name.to_string(), Align::Right);
        let size = |bytes: u64| match self.parsable {
            true => bytes.to_string(),
            false => ui.size(bytes),
        };
        let mut table = Table::new([
            ("NAME".to_string(), Align::Left),
            number("SIZE"),
            number("REFER"),
            number("EXCL"),
            number("SHARED"),
        ]);
        for DuRowDoc { name, usage, .. } in &rows {
            table.row(vec![
                name.clone(),
                size(usage.size),
                size(usage.refer),
                size(usage.exclusive),
                size(usage.shared),
            ]);
        }
        if self.no_header {
            ui.data(table.script())?;
            return ui.damage(&damaged);
        }
        let summary = format!(
            "{} on {} of disk; full copies would take {}\n",
            counted(rows.len(), "name"),
            size(total.stored),
            size(total.full_copies)
        );
        ui.data(table.text(true) + &summary)?;
        ui.damage(&damaged)
    }
    /// What is named, each once.
    fn objects(&self, store: &Store) -> Result<Found<Object>> {
        if self.references.is_empty() {
            return store.survey();
        }
        let mut objects: Vec<Object> = Vec::new();
        for reference in &self.references {
            let object = store.resolve_any(reference)?;
            if objects.iter().all(|o| o.name != object.name) {
                objects.push(object);
            }
        }
        Ok(Found {
            sound: objects,
            damaged: Vec::new(),
        })
    }
}

/// Show where the bytes of a disk come from
#[derive(Args, Debug)]
#[command(
    after_help = "-H has columns: start, length, kind (absent, zero, layer, base), owner, id, depth, offset in the owner's file. DEPTH 0 is \
        the object's own layer, 1 its parent, and so on down. What is not known is `-`."
)]
pub(crate) struct Map {
    /// What to look at
    #[arg(value_name = "REF")]
    reference: String,
    /// For scripts: tabs between columns, no heading
    #[arg(short = 'H', long)]
    no_header: bool,
    /// Exact numbers: bytes
    #[arg(short, long)]
    parsable: bool,
}

/// Bytes whose extents are asked for at once.
const WINDOW: u64 = 512 * REGION_BYTES;

#[derive(Serialize)]
struct ExtentDoc<'a> {
    start: u64,
    length: u64,
    #[serde(rename = "type")]
    kind: &'static str,
    zero: bool,
    data: bool,
    depth: Option<u32>,
    id: Option<String>,
    name: Option<&'a str>,
    offset: Option<u64>,
}

/// Bytes of a listing that are written when it is whole, or there are more: then no error can take them back.
pub(super) const HELD: usize = 1 << 20;

impl Map {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let store = context.open()?;
        let (mut looked, details) = store.with_object(&self.reference, |object| {
            let looked = Looked::at(context, &store, object)?;
            let object = looked.object().unwrap_or(object);
            let details = store.details(object)?;
            Ok((looked, details))
        })?;
        let object = details.object.clone();
        let (chain, names) = (details.chain, Names::from_ids(&details.names));
        // There may be millions: they are written as they come.
        let mut out = BufWriter::with_capacity(HELD, io::stdout().lock());
        let written = |result: io::Result<()>| result.map_err(|e| Stop::output(&e));
        let mut first = true;
        if ui.json {
            let (name, id) = (serde_json::json!(object.name), object.id);
            let kind = object.word();
            written(write!(
                out,
                "{{\"schema\":{SCHEMA},\"name\":{name},\"kind\":\"{kind}\",\"id\":\"{id}\",\"size\":{},\"extents\":[",
                object.size
            ))?;
        } else if !self.no_header {
            written(writeln!(out, "{:>15}  {:>9}  FROM", "START", "LENGTH"))?;
        }
        let size = looked.state().size();
        let extents = |at, len| {
            look(&mut [&mut looked], |looked| {
                looked[0].state().disk().extents(at, len)
            })
        };
        let listed = each_extent(size, extents, |extent| {
            let document = describe(extent, &chain, &names);
            if !ui.json {
                let length = match self.parsable {
                    true => extent.len.to_string(),
                    false => ui.size(extent.len),
                };
                if self.no_header {
                    return written(writeln!(out, "{}", script_line(&document, &length)));
                }
                let from = match (document.depth, document.name, &document.id) {
                    (_, Some(name), _) => format!(" {name}"),
                    (_, None, Some(id)) => format!(" ({})", &id[..12]),
                    _ => String::new(),
                };
                let at = document
                    .offset
                    .map_or(String::new(), |at| format!(" at {at:#x}"));
                let kind = document.kind;
                return written(writeln!(
                    out,
                    "{:>15}  {length:>9}  {kind}{from}{at}",
                    extent.at
                ));
            }
            let text = serde_json::to_string(&document);
            let text = text.unwrap_or_else(|e| unreachable!("plain fields: {e}"));
            let comma = if std::mem::take(&mut first) { "" } else { "," };
            written(write!(out, "{comma}\n{text}"))
        });
        if let Err(stop) = listed {
            if ui.json {
                // An error has a document of its own.
                let _ = out.into_parts();
            }
            return Err(stop);
        }
        if ui.json {
            written(writeln!(out, "\n]}}"))?;
        }
        written(out.flush())
    }
}

/// An extent for scripts.
fn script_line(extent: &ExtentDoc<'_>, length: &str) -> String {
    let known = |text: Option<String>| text.unwrap_or_else(|| "-".to_string());
    let owner = extent.name.map(str::to_string).or(extent.id.clone());
    [
        extent.start.to_string(),
        length.to_string(),
        extent.kind.to_string(),
        known(owner),
        known(extent.id.clone()),
        known(extent.depth.map(|d| d.to_string())),
        known(extent.offset.map(|at| at.to_string())),
    ]
    .join("\t")
}

/// Where an extent comes from. `chain` names the layer of each depth.
fn describe<'a>(extent: Extent, chain: &[Below], names: &'a Names) -> ExtentDoc<'a> {
    let of_layer = |depth: u32| chain.get(depth as usize).map(|below| below.id());
    let (kind, depth, id, offset) = match extent.from {
        Source::Absent => ("absent", None, None, None),
        Source::Zero { depth } => ("zero", Some(depth), of_layer(depth), None),
        Source::Layer { depth, slot } => ("layer", Some(depth), of_layer(depth), Some(slot.at())),
        Source::Base | Source::Hole => {
            let depth = chain.len().saturating_sub(1) as u32;
            ("base", Some(depth), of_layer(depth), Some(extent.at))
        }
    };
    let data = matches!(extent.from, Source::Layer { .. } | Source::Base);
    ExtentDoc {
        start: extent.at,
        length: extent.len,
        kind,
        zero: !data,
        data,
        depth,
        id: id.map(|id| id.to_string()),
        name: id.and_then(|id| names.first(id)),
        offset,
    }
}

/// Calls `each` with the extents of a disk of `size` bytes in order; neighbours of one source are one.
fn each_extent(
    size: u64,
    mut extents: impl FnMut(u64, u64) -> Result<Vec<Extent>>,
    mut each: impl FnMut(Extent) -> Outcome,
) -> Outcome {
    let mut last: Option<Extent> = None;
    let mut at = 0;
    while at < size {
        let len = WINDOW.min(size - at);
        for extent in extents(at, len)? {
            match &mut last {
                Some(last) if continues(last, &extent) => last.len += extent.len,
                _ => {
                    if let Some(last) = last.replace(extent) {
                        each(last)?;
                    }
                }
            }
        }
        at += len;
    }
    last.map_or(Ok(()), each)
}

/// Does `next` go on where `last` ends, in the virtual disk and in the file?
fn continues(last: &Extent, next: &Extent) -> bool {
    match (last.from, next.from) {
        (
            Source::Layer {
                depth: a,
                slot: from,
            },
            Source::Layer { depth: b, slot: to },
        ) => a == b && from.at() + last.len == to.at(),
        (a, b) => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Slot;

    #[test]
    fn extents_join_only_where_the_file_goes_on() {
        let layer = |at, slot| Extent {
            at,
            len: BLOCK,
            from: Source::Layer {
                depth: 0,
                slot: Slot(slot),
            },
        };
        assert!(continues(&layer(0, 5), &layer(BLOCK, 6)));
        assert!(!continues(&layer(0, 5), &layer(BLOCK, 8)));
        let base = |at| Extent {
            at,
            len: BLOCK,
            from: Source::Base,
        };
        assert!(continues(&base(0), &base(BLOCK)));
        assert!(!continues(&base(0), &layer(BLOCK, 1)));
    }
}
