//! Lists: `ls`.

use crate::{
    cli::{
        Outcome,
        context::{Context, with_mounts},
        history::when,
        names::Names,
        render::{
            json::{AttachedDoc, DamageDoc, ObjectDoc, UsageDoc, via_word},
            table::{Align, Table},
            time,
        },
    },
    daemon::Attached,
    error::{Error, Kind, Result},
    format::stream::Digest,
    store::{
        Found, LayerInfo, Object, ObjectKind, QuotaUse, Store, Usage,
        history::{HistoryReport, Point},
    },
    units::BLOCK,
};
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::{collections::HashMap, path::PathBuf};

/// What is listed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum What {
    /// Raw files at the bottom
    Bases,
    /// What disks are forked from: bases and committed layers
    Images,
    /// What can be written: one layer of its own each
    Disks,
    /// Kept states of disks
    Snapshots,
    /// Layers, with and without names
    Layers,
    /// What is in use
    Attached,
}

/// List what there is
#[derive(Args, Debug)]
#[command(after_help = concat!(
    "Columns: name, kind, size, parent, created, message, id, device, mount, refer, excl, shared, used (host bytes of its own layer or \
        base), written (data in its own layer), depth, quota, quota_used, digest.\n",
    "Of layers: id, state, size, alloc, private, parent, names.\n",
    "Of a history: point, time, changed, held.\n",
    "Of attached: name, kind, size, device, file, mount, ro, via, count, id."
))]
pub(crate) struct Ls {
    /// What to list [default: all names]
    #[arg(value_enum)]
    what: Option<What>,
    /// List the points of the history of a disk
    #[arg(long, value_name = "DISK", conflicts_with = "what")]
    history: Option<String>,
    /// The columns, separated by commas
    #[arg(short = 'o', long, value_name = "COLUMNS", value_delimiter = ',')]
    output: Vec<String>,
    /// For scripts: tabs between columns, no heading
    #[arg(short = 'H', long)]
    no_header: bool,
    /// Exact numbers: bytes, and seconds since 1970
    #[arg(short, long)]
    parsable: bool,
}

/// How values are shown.
struct Show<'a> {
    context: &'a Context,
    exact: bool,
    now: u64,
}

impl Show<'_> {
    fn size(&self, bytes: u64) -> String {
        if self.exact {
            bytes.to_string()
        } else {
            self.context.ui.size(bytes)
        }
    }
    fn time(&self, seconds: u64) -> String {
        if self.exact {
            seconds.to_string()
        } else {
            time::ago(seconds, self.now)
        }
    }
}

/// A column: its name as -o takes it, how it leans, and the cell of a row.
struct Column<R> {
    name: &'static str,
    align: Align,
    cell: fn(&R, &Show<'_>) -> String,
}

fn words<R>(name: &'static str, cell: fn(&R, &Show<'_>) -> String) -> Column<R> {
    let align = Align::Left;
    Column { name, align, cell }
}
fn number<R>(name: &'static str, cell: fn(&R, &Show<'_>) -> String) -> Column<R> {
    let align = Align::Right;
    Column { name, align, cell }
}

impl Ls {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let store = context.open()?;
        if let Some(disk) = &self.history {
            return self.points(context, &store, disk);
        }
        match self.what {
            Some(What::Layers) => self.layers(context, &store),
            Some(What::Attached) => self.attached(context, &store),
            what => self.objects(context, &store, what),
        }
    }

    fn objects(&self, context: &Context, store: &Store, what: Option<What>) -> Outcome {
        let wanted = |kind| match what {
            Some(What::Bases) => kind == ObjectKind::Base,
            Some(What::Images) => matches!(kind, ObjectKind::Base | ObjectKind::Image),
            Some(What::Disks) => kind == ObjectKind::Disk,
            Some(What::Snapshots) => kind == ObjectKind::Snapshot,
            _ => true,
        };
        let columns = self.choose(
            object_columns(),
            "name,kind,size,parent,created,device,message",
        )?;
        let Found {
            sound: all,
            mut damaged,
        } = store.survey()?;
        let names = Names::from_objects(&all);
        let attached: HashMap<String, (Attached, Vec<PathBuf>)> = context
            .attached_for_show(store)
            .into_iter()
            .map(|(a, mounts)| (a.name.clone(), (a, mounts)))
            .collect();
        // To know the space of an object its map is walked: only if that is asked for.
        let space = columns.iter().any(|c| SPACE.contains(&c.name));
        // Their records are read once more for it.
        let digests = match columns.iter().any(|c| c.name == "digest") {
            true => store.known_digests()?,
            false => HashMap::new(),
        };
        let all: Vec<Object> = all.into_iter().filter(|o| wanted(o.kind)).collect();
        let all: Vec<(Object, Option<Usage>)> = if space {
            let known = store.usages(all)?;
            damaged.extend(known.damaged);
            known.sound.into_iter().map(|(o, u)| (o, Some(u))).collect()
        } else {
            all.into_iter().map(|o| (o, None)).collect()
        };
        let quotas = columns.iter().any(|c| c.name.starts_with("quota"));
        let mut rows = Vec::new();
        for (object, usage) in all {
            let attached = attached.get(&object.name);
            let (attached, mounts) = attached.cloned().unzip();
            let quota = match quotas {
                true => context.quota_of(store, &object, attached.is_some()),
                false => None,
            };
            rows.push(ObjectRow {
                quota,
                parent: object.parent.map(|below| names.show(below.id())),
                digest: digests.get(&object.name).copied(),
                object,
                usage,
                attached,
                mounts: mounts.unwrap_or_default(),
            });
        }
        if context.ui.json {
            let objects = rows.iter().map(|row| ListedDoc {
                object: ObjectDoc::new(&row.object, &names),
                usage: row.usage.map(UsageDoc::from),
                quota: row.quota.and_then(|q| q.quota),
                quota_used: row.quota.map(|q| q.used),
                digest: row.digest.map(|digest| digest.to_string()),
                attached: row.attached.is_some(),
                device: row.attached.as_ref().and_then(|a| a.device.clone()),
                mounts: row.mounts.clone(),
            });
            context.ui.document(ObjectsDoc {
                objects: objects.collect(),
                damaged: DamageDoc::all(&damaged),
            })?;
        } else {
            self.print(context, columns, &rows, true)?;
        }
        context.ui.damage(&damaged)
    }

    fn layers(&self, context: &Context, store: &Store) -> Outcome {
        let columns = self.choose(layer_columns(), "id,state,size,alloc,private,parent,names")?;
        let names = Names::of(store)?;
        let found = store.layers()?;
        let rows: Vec<LayerRow> = found
            .sound
            .into_iter()
            .map(|layer| LayerRow {
                parent: names.show(layer.parent.id()),
                layer,
            })
            .collect();
        if context.ui.json {
            let layers = rows.iter().map(|row| LayerDoc {
                id: row.layer.id.to_string(),
                state: row.layer.state,
                size: row.layer.size,
                allocated: row.layer.allocated,
                private_bytes: row.layer.private_bytes,
                parent: names.first(row.layer.parent.id()).map(str::to_string),
                parent_id: row.layer.parent.id().to_string(),
                names: row.layer.names.clone(),
            });
            context.ui.document(LayersDoc {
                layers: layers.collect(),
                damaged: DamageDoc::all(&found.damaged),
            })?;
        } else {
            self.print(context, columns, &rows, false)?;
        }
        context.ui.damage(&found.damaged)
    }

    fn attached(&self, context: &Context, store: &Store) -> Outcome {
        let columns = self.choose(attached_columns(), "name,kind,size,device,mount,ro,count")?;
        let rows = with_mounts(context.attached(store)?);
        if context.ui.json {
            let attached = rows.iter().map(|(a, mounts)| AttachedDoc::new(a, mounts));
            return context.ui.document(AttachedListDoc {
                attached: attached.collect(),
            });
        }
        self.print(context, columns, &rows, false)
    }

    fn points(&self, context: &Context, store: &Store, disk: &str) -> Outcome {
        let columns = self.choose(point_columns(), "point,time,changed,held")?;
        let HistoryReport {
            limits,
            points,
            bytes,
        } = store.history(disk)?;
        if context.ui.json {
            return context.ui.document(HistoryDoc {
                name: store.resolve(disk)?.name,
                window: limits.and_then(|l| l.window),
                limit: limits.and_then(|l| l.bytes),
                history_bytes: bytes,
                points: points.iter().map(PointDoc::new).collect(),
            });
        }
        if points.is_empty() {
            context.ui.talk(match limits {
                Some(_) => format!("the history of {disk} begins when it is attached"),
                None => format!("{disk} keeps no history: `forkdisk create --history 10m`"),
            });
            return Ok(());
        }
        self.print(context, columns, &points, false)
    }

    /// The columns of `-o`, or the usual ones.
    fn choose<R>(&self, all: Vec<Column<R>>, usual: &str) -> Result<Vec<Column<R>>> {
        let wish: Vec<&str> = match &self.output[..] {
            [] => usual.split(',').collect(),
            wish => wish.iter().map(String::as_str).collect(),
        };
        let known: Vec<&str> = all.iter().map(|c| c.name).collect();
        let mut chosen = Vec::new();
        for wish in wish {
            let wish = wish.trim().to_ascii_lowercase();
            let Some(found) = all.iter().find(|c| c.name == wish) else {
                return Err(
                    Error::new(Kind::Invalid, format!("there is no column `{wish}`"))
                        .hint(format!("the columns are {}", known.join(", "))),
                );
            };
            chosen.push(Column { ..*found });
        }
        Ok(chosen)
    }

    /// Prints the table. Columns that nobody asked for and that say nothing are left out, if `drop_empty`.
    fn print<R>(
        &self,
        context: &Context,
        columns: Vec<Column<R>>,
        rows: &[R],
        drop_empty: bool,
    ) -> Outcome {
        let show = Show {
            context,
            exact: self.parsable,
            now: time::now(),
        };
        let mut cells: Vec<Vec<String>> = rows
            .iter()
            .map(|row| columns.iter().map(|c| (c.cell)(row, &show)).collect())
            .collect();
        let optional = drop_empty && self.output.is_empty() && !self.no_header;
        let kept: Vec<bool> = (0..columns.len())
            .map(|i| !optional || cells.iter().any(|row| !row[i].is_empty()))
            .collect();
        let heading = columns.iter().zip(&kept).filter(|(_, kept)| **kept);
        let mut table = Table::new(heading.map(|(c, _)| (c.name.to_ascii_uppercase(), c.align)));
        for row in &mut cells {
            let mut kept = kept.iter();
            row.retain(|_| kept.next() == Some(&true));
            table.row(std::mem::take(row));
        }
        if self.no_header {
            return context.ui.data(table.script());
        }
        if table.is_empty() {
            context.ui.talk("there is nothing to list");
            return Ok(());
        }
        context.ui.data(table.text(true))
    }
}

/// Columns for which the space of an object must be known.
const SPACE: &[&str] = &["refer", "excl", "shared", "used", "written", "depth"];

struct ObjectRow {
    object: Object,
    parent: Option<String>,
    usage: Option<Usage>,
    quota: Option<QuotaUse>,
    digest: Option<Digest>,
    attached: Option<Attached>,
    mounts: Vec<PathBuf>,
}

fn object_columns() -> Vec<Column<ObjectRow>> {
    vec![
        words("name", |r, _| r.object.name.clone()),
        words("kind", |r, _| r.object.kind.word().to_string()),
        number("size", |r, s| s.size(r.object.size)),
        words("parent", |r, _| r.parent.clone().unwrap_or_default()),
        words("created", |r, s| s.time(r.object.created)),
        words("message", |r, _| {
            r.object.message.clone().unwrap_or_default()
        }),
        words("id", |r, _| r.object.id.to_string()),
        words("device", |r, _| {
            r.attached.as_ref().map(shown_at).unwrap_or_default()
        }),
        words("mount", |r, _| paths(&r.mounts)),
        number("refer", |r, s| {
            r.usage.map_or(String::new(), |u| s.size(u.refer))
        }),
        number("excl", |r, s| {
            r.usage.map_or(String::new(), |u| s.size(u.exclusive))
        }),
        number("shared", |r, s| {
            r.usage.map_or(String::new(), |u| s.size(u.shared))
        }),
        number("used", |r, s| {
            r.usage.map_or(String::new(), |u| s.size(u.allocated))
        }),
        number("written", |r, s| {
            r.usage.map_or(String::new(), |u| s.size(u.private))
        }),
        number("depth", |r, _| {
            r.usage.map_or(String::new(), |u| u.depth.to_string())
        }),
        number("quota", |r, s| {
            let quota = r.quota.and_then(|q| q.quota);
            quota.map_or(String::new(), |bytes| s.size(bytes))
        }),
        number("quota_used", |r, s| {
            r.quota.map_or(String::new(), |q| s.size(q.used))
        }),
        words("digest", |r, _| {
            r.digest.map(|d| d.to_string()).unwrap_or_default()
        }),
    ]
}

struct LayerRow {
    layer: LayerInfo,
    parent: String,
}

fn layer_columns() -> Vec<Column<LayerRow>> {
    vec![
        words("id", |r, s| {
            if s.exact {
                r.layer.id.to_string()
            } else {
                r.layer.id.short()
            }
        }),
        words("state", |r, _| r.layer.state.to_string()),
        number("size", |r, s| s.size(r.layer.size)),
        number("alloc", |r, s| s.size(r.layer.allocated)),
        number("private", |r, s| s.size(r.layer.private_bytes)),
        words("parent", |r, _| r.parent.clone()),
        words("names", |r, _| r.layer.names.join(",")),
    ]
}

fn point_columns() -> Vec<Column<Point>> {
    vec![
        number("point", |p, _| format!("#{}", p.number)),
        words("time", |p, s| {
            if s.exact {
                (p.time / 1000).to_string()
            } else {
                when(p.time)
            }
        }),
        number("changed", |p, s| s.size(p.changed * BLOCK)),
        number("held", |p, s| s.size(p.held * BLOCK)),
    ]
}

fn attached_columns() -> Vec<Column<(Attached, Vec<PathBuf>)>> {
    vec![
        words("name", |(a, _), _| a.name.clone()),
        words("kind", |(a, _), _| a.kind.word().to_string()),
        number("size", |(a, _), s| s.size(a.size)),
        words("device", |(a, _), _| shown_at(a)),
        words("file", |(a, _), _| a.file.display().to_string()),
        words("mount", |(_, mounts), _| paths(mounts)),
        words("ro", |(a, _), _| {
            if a.read_only { "ro" } else { "rw" }.to_string()
        }),
        words("via", |(a, _), _| via_word(a.via).to_string()),
        number("count", |(a, _), _| a.count.to_string()),
        words("id", |(a, _), _| a.id.to_string()),
    ]
}

/// The device of an attachment, or its URI, or its file.
pub(crate) fn shown_at(attached: &Attached) -> String {
    let place = attached.device.clone().or_else(|| attached.uri());
    place.unwrap_or_else(|| attached.file.display().to_string())
}

/// Paths, separated by commas.
pub(crate) fn paths(paths: &[PathBuf]) -> String {
    let shown: Vec<String> = paths.iter().map(|p| p.display().to_string()).collect();
    shown.join(",")
}

#[derive(Serialize)]
struct ObjectsDoc {
    objects: Vec<ListedDoc>,
    damaged: Vec<DamageDoc>,
}

#[derive(Serialize)]
struct ListedDoc {
    #[serde(flatten)]
    object: ObjectDoc,
    attached: bool,
    device: Option<String>,
    mounts: Vec<PathBuf>,
    usage: Option<UsageDoc>,
    digest: Option<String>,
    quota: Option<u64>,
    quota_used: Option<u64>,
}

#[derive(Serialize)]
struct HistoryDoc {
    name: String,
    /// Seconds.
    window: Option<u64>,
    /// Bytes.
    limit: Option<u64>,
    history_bytes: u64,
    points: Vec<PointDoc>,
}

#[derive(Serialize)]
struct PointDoc {
    point: u64,
    time: u64,
    time_ms: u64,
    changed: u64,
    held: u64,
}

impl PointDoc {
    fn new(point: &Point) -> PointDoc {
        PointDoc {
            point: point.number,
            time: point.time / 1000,
            time_ms: point.time,
            changed: point.changed * BLOCK,
            held: point.held * BLOCK,
        }
    }
}

#[derive(Serialize)]
struct LayersDoc {
    layers: Vec<LayerDoc>,
    damaged: Vec<DamageDoc>,
}

#[derive(Serialize)]
struct LayerDoc {
    id: String,
    state: &'static str,
    size: u64,
    allocated: u64,
    private_bytes: u64,
    parent: Option<String>,
    parent_id: String,
    names: Vec<String>,
}

#[derive(Serialize)]
struct AttachedListDoc {
    attached: Vec<AttachedDoc>,
}
