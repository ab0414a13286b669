//! The daemon: `daemon run`, `daemon status`, `daemon stop`, `daemon takeover`.

use crate::{
    cli::{
        Outcome, Stop,
        attach::TransportArg,
        context::Context,
        render::{
            json::Done,
            table::{Align, Table},
            time,
        },
    },
    daemon::{self, Client, Keep},
    error::{Error, Kind},
};
use clap::Subcommand;
use serde_json::{Value, json};

/// Run, ask or stop the daemon that serves attached disks (attach starts it)
#[derive(Subcommand, Debug)]
pub(crate) enum Daemon {
    /// Become the daemon of the store
    Run {
        /// Stay in the foreground, for systemd
        #[arg(long)]
        foreground: bool,
        #[command(flatten)]
        transport: TransportArg,
    },
    /// Become the keeper, in the background
    #[command(hide = true)]
    Keep {
        /// Go on as the keeper that this process was as another program
        #[arg(long, value_name = "DESCRIPTORS")]
        go_on: Option<String>,
        /// Take the place of a dead keeper, for this server
        #[arg(long, value_name = "PID", conflicts_with = "go_on")]
        adopt: Option<i32>,
        /// The log goes to standard error too
        #[arg(long)]
        foreground: bool,
        #[command(flatten)]
        transport: TransportArg,
    },
    /// Become the server of a keeper
    #[command(hide = true)]
    Serve {
        #[command(flatten)]
        transport: TransportArg,
    },
    /// Let the device of an attached disk have the disk's size
    #[command(hide = true)]
    Fit {
        /// The disk
        disk: String,
    },
    /// Tell whether it runs, and its processes and places
    #[command(after_help = "Exit code 1: no daemon runs.")]
    Status,
    /// Stop it cleanly
    Stop,
    /// Let this program take over from the one that the daemon runs, without detaching anything
    #[command(
        after_help = "Attached disks stay attached and mounted; their users see a short pause. If this program cannot serve, the\n\
            daemon goes on with the one it had."
    )]
    Takeover,
}

impl Daemon {
    /// Does this command set up its log by itself?
    pub(crate) fn logs_for_itself(&self) -> bool {
        matches!(
            self,
            Daemon::Run { .. } | Daemon::Keep { .. } | Daemon::Serve { .. }
        )
    }
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let store = context.open()?;
        let path = store.path().to_path_buf();
        let shown = path.display();
        let done = |dry_run| Done {
            store: &path,
            dry_run,
        };
        match self {
            Daemon::Run { .. } if context.dry_run => ui.answer(done(true), || {
                format!("would become the daemon of {shown}\n")
            }),
            Daemon::Run {
                foreground,
                transport,
            } => Ok(daemon::run(store, foreground, transport.or_default())?),
            Daemon::Keep {
                go_on,
                adopt,
                foreground,
                transport,
            } => {
                let how = match (go_on, adopt) {
                    (Some(descriptors), _) => Keep::GoOn(descriptors),
                    (None, Some(server)) => Keep::Adopt(server),
                    (None, None) => Keep::New(transport.or_default()),
                };
                Ok(daemon::keep(store, how, foreground)?)
            }
            Daemon::Serve { transport } => Ok(daemon::serve(store, transport.or_default())?),
            Daemon::Fit { disk } => match Client::connect(&store)? {
                Some(mut client) => Ok(client.fit(&disk)?),
                None => Ok(()),
            },
            Daemon::Takeover => {
                let Some(mut client) = Client::connect(&store)? else {
                    return Err(
                        Error::new(Kind::NotFound, format!("no daemon runs for {shown}"))
                            .hint("`forkdisk attach` starts one")
                            .into(),
                    );
                };
                if context.dry_run {
                    return ui.answer(done(true), || {
                        format!("would take over from the daemon of {shown}\n")
                    });
                }
                let taken = client.take_over(&store)?;
                ui.talk(format_args!(
                    "took over from the daemon of {shown}: server {} instead of {}",
                    taken.server, taken.former
                ));
                if ui.json {
                    ui.document(json!({
                        "store": path, "keeper_pid": taken.keeper, "server_pid": taken.server,
                        "former_server_pid": taken.former, "version": taken.version,
                    }))
                } else {
                    Ok(())
                }
            }
            Daemon::Status => {
                let Some(mut client) = Client::connect(&store)? else {
                    ui.answer(json!({"running": false, "store": path}), || {
                        format!("no daemon runs for {shown}\n")
                    })?;
                    return Err(Stop::Code(1));
                };
                let mut status = client.status()?;
                if let Value::Object(fields) = &mut status {
                    fields.insert("running".into(), true.into());
                    fields.insert("store".into(), json!(path));
                }
                ui.answer(&status, || status_text(&status))
            }
            Daemon::Stop => {
                let Some(mut client) = Client::connect(&store)? else {
                    let left = !context.dry_run && daemon::clear_dead(&store);
                    ui.talk(format_args!("no daemon runs for {shown}"));
                    if left {
                        ui.talk("the mount of a dead one was taken away");
                    }
                    return if ui.json {
                        ui.document(json!({"store": path, "stopped": false}))
                    } else {
                        Ok(())
                    };
                };
                if context.dry_run {
                    return ui.answer(done(true), || format!("would stop the daemon of {shown}\n"));
                }
                client.stop()?;
                ui.talk(format_args!("stopped the daemon of {shown}"));
                if ui.json {
                    ui.document(json!({"store": path, "stopped": true}))
                } else {
                    Ok(())
                }
            }
        }
    }
}

/// Counts that are not zero: `12 reads, 4096 bytes read`.
fn counts_text(counts: &serde_json::Map<String, Value>) -> String {
    let counted = counts.iter().filter(|(_, n)| n.as_u64() != Some(0));
    let shown: Vec<String> = counted
        .map(|(name, n)| format!("{n} {}", name.replace('_', " ")))
        .collect();
    match &shown[..] {
        [] => "none".to_string(),
        all => all.join(", "),
    }
}

/// One line for each field.
fn status_text(status: &Value) -> String {
    let mut table = Table::new([(String::new(), Align::Left), (String::new(), Align::Left)]);
    let Value::Object(fields) = status else {
        return format!("{status}\n");
    };
    for (name, value) in fields {
        let value = match (name.as_str(), value) {
            ("uptime" | "uptime_seconds", Value::Number(n)) => {
                n.as_u64().map_or(n.to_string(), time::span)
            }
            ("awake_seconds", Value::Null) => "never".to_string(),
            (_, Value::String(text)) => text.clone(),
            (_, Value::Array(items)) => items.len().to_string(),
            (_, Value::Object(counts)) => counts_text(counts),
            (_, other) => other.to_string(),
        };
        table.row(vec![name.replace('_', " "), value]);
    }
    table.text(false)
}
