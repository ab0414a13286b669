//! Errors: a sentence and a hint, or a JSON document.

use crate::error::{Error, Kind};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use serde_json::json;

/// What is said to do when the error itself knows nothing better.
pub fn default_hint(kind: Kind) -> &'static str {
    match kind {
        Kind::Invalid => "`forkdisk help COMMAND` shows what a command takes",
        Kind::NoStore => {
            "`forkdisk init` makes a store; -S DIR or FORKDISK_STORE names one that is elsewhere"
        }
        Kind::NotFound => "`forkdisk ls` lists what there is",
        Kind::Exists => "choose another name, or `forkdisk rename` or `forkdisk rm` what has it",
        Kind::Busy => {
            "`forkdisk ls attached` shows what is in use; wait for it, or `forkdisk detach` it"
        }
        Kind::NoSpace => {
            "free space on the host filesystem (`forkdisk gc`, `forkdisk rm`), then try again"
        }
        Kind::Corrupt => "`forkdisk check` lists what is damaged; other objects are not affected",
        Kind::Version => "this store needs a newer forkdisk",
        Kind::ReadOnly => {
            "a snapshot or an image is only read: `forkdisk create` makes a disk of it"
        }
        Kind::Permission => "run as the owner of the store, or as root",
        Kind::Unsupported => "`forkdisk doctor` tells what this machine can do",
        Kind::Poisoned => "`forkdisk detach` and attach it again; what was flushed is safe",
        Kind::Interrupted => "nothing was left half-done; run the command again",
        Kind::Io => "`dmesg` and `forkdisk doctor` may tell more",
    }
}

/// The hint of an error: its own, or the default of its kind.
pub fn hint(error: &Error) -> &str {
    error
        .hint_text()
        .unwrap_or_else(|| default_hint(error.kind()))
}

/// The error as a JSON document, on one line.
pub fn json_text(error: &Error) -> String {
    let mut body = json!({
        "code": error.kind().code(),
        "message": error.to_string(),
        "hint": hint(error),
        "exit_code": error.exit_code(),
    });
    if let Some(layer) = error.layer_id() {
        body["layer"] = json!(layer.to_string());
    }
    if let Some(block) = error.block_lba() {
        body["block"] = json!(block.0);
    }
    json!({"schema": 1, "error": body}).to_string()
}

/// What clap found wrong with the command line, as an error of ours. `command` is the one that was meant.
pub fn from_clap(error: &clap::Error, command: Option<&str>) -> Error {
    let rendered = error.render().to_string();
    let mut paragraphs = rendered.split("\n\n");
    let first = paragraphs.next().unwrap_or_default();
    let message = first.strip_prefix("error: ").unwrap_or(first);
    let message: Vec<&str> = message.lines().map(str::trim).collect();
    let message = message.join(" ").trim_end_matches('.').to_string();
    let (mut tips, mut usage) = (Vec::new(), None);
    for line in paragraphs.flat_map(str::lines) {
        let line = line.trim();
        if let Some(tip) = line.strip_prefix("tip: ") {
            tips.push(tip.to_string());
        } else if let Some(text) = line.strip_prefix("Usage: ") {
            usage = Some(text.to_string());
        }
    }
    if let Some(name) = dashed_value(error) {
        tips = vec![format!(
            "`{name}` is read as an option; names do not begin with `-`, files can be written ./{name}"
        )];
    }
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand
    ) {
        let hint = match command {
            Some(command) => format!("`forkdisk help {command}` lists its commands"),
            None => "`forkdisk help` lists the commands".into(),
        };
        return Error::new(Kind::Invalid, "a command is missing").hint(hint);
    }
    let mut hints = tips;
    if error.kind() == ErrorKind::InvalidSubcommand {
        match (grouping_word(error), command) {
            (Some(_), Some(command)) => {
                usage = None;
                hints = vec![format!("write `forkdisk {command}`")];
            }
            (_, None) => {
                usage = None;
                hints.push("`forkdisk help` lists the commands".into());
            }
            _ => {}
        }
    }
    if let Some(usage) = usage {
        hints.push(format!("usage: {usage}"));
    }
    if hints.is_empty() {
        let command = command.unwrap_or("help");
        hints.push(format!("`forkdisk {command} --help` tells what it takes"));
    }
    let hint = hints.join("; ");
    Error::new(Kind::Invalid, message).hint(hint)
}

/// The word of a group of commands (`forkdisk store init`) that was taken for a command.
fn grouping_word(error: &clap::Error) -> Option<&str> {
    match error.get(ContextKind::InvalidSubcommand) {
        Some(ContextValue::String(word)) => ["store", "image", "disk"]
            .into_iter()
            .find(|group| *group == word),
        _ => None,
    }
}

/// The argument that clap took for an option, where it may have been meant as a name.
fn dashed_value(error: &clap::Error) -> Option<&str> {
    if error.kind() != ErrorKind::UnknownArgument {
        return None;
    }
    // A long option with a near miss is a slip of the pen.
    if error.get(ContextKind::SuggestedArg).is_some() {
        return None;
    }
    match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(arg)) if arg.starts_with('-') => Some(arg),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_errors_have_a_code_a_message_and_a_hint() {
        let error =
            Error::new(Kind::NotFound, "there is no disk \"x\"").block(crate::units::Lba(7));
        let text = json_text(&error);
        let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(value["schema"], 1);
        assert_eq!(value["error"]["code"], "not_found");
        assert_eq!(
            value["error"]["message"],
            "there is no disk \"x\" (block 7)"
        );
        assert_eq!(value["error"]["hint"], default_hint(Kind::NotFound));
        assert_eq!(value["error"]["exit_code"], 12);
        assert_eq!(value["error"]["block"], 7);
        assert_eq!(text.lines().count(), 1);
    }

    #[test]
    fn an_own_hint_comes_first() {
        let error = Error::new(Kind::Busy, "no").hint("do that");
        assert_eq!(hint(&error), "do that");
    }
}
