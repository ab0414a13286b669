//! What travels over the control socket: one JSON document a line, a request and its answer.
//!
//! The peer may be anyone who can open the socket (mode 0600: the owner and root), so nothing it says is trusted to be
//! well-formed; a line of more than [`MAX_LINE`] bytes ends the conversation.

use super::{Attached, Via};
use crate::error::{Error, Kind, Result};
use crate::store::{Below, Object, ObjectKind};
use crate::units::Id;
use serde_json::{Value, json};
use std::io::{BufRead, Read, Write};

/// Version of the protocol; a server refuses others.
pub const VERSION: u64 = 1;

/// Longest line: `create` with 10,000 names of 100 bytes fits.
pub const MAX_LINE: u64 = 8 << 20;

/// Reads one line; `None` at the end of the conversation.
pub fn receive(reader: &mut impl BufRead) -> Result<Option<Value>> {
    let mut line = Vec::new();
    let n = reader
        .by_ref()
        .take(MAX_LINE)
        .read_until(b'\n', &mut line)
        .map_err(|e| Error::io("read from", "the control socket", &e))?;
    if n == 0 {
        return Ok(None);
    }
    if line.pop() != Some(b'\n') {
        return Err(Error::new(
            Kind::Invalid,
            "a message on the control socket is cut or too long",
        ));
    }
    serde_json::from_slice(&line).map(Some).map_err(|e| {
        Error::new(
            Kind::Invalid,
            format!("a message on the control socket is no JSON: {e}"),
        )
    })
}

/// Writes one line.
pub fn send(writer: &mut impl Write, value: &Value) -> Result<()> {
    send_all(writer, &[value])
}

/// Writes one line for each, at once.
pub fn send_all(writer: &mut impl Write, values: &[&Value]) -> Result<()> {
    let lines: String = values.iter().map(|value| format!("{value}\n")).collect();
    writer
        .write_all(lines.as_bytes())
        .map_err(|e| Error::io("write to", "the control socket", &e))
}

/// A failure as an answer.
pub fn failure(e: &Error) -> Value {
    json!({"error": {"code": e.kind().code(), "message": e.to_string(), "hint": e.hint_text()}})
}

/// The answer, or the failure it stands for.
pub fn success(answer: Value) -> Result<Value> {
    let Some(error) = answer.get("error") else {
        return Ok(answer);
    };
    let text = |key: &str| error.get(key).and_then(Value::as_str);
    let e = Error::new(
        Kind::from_code(text("code").unwrap_or("io")),
        text("message").unwrap_or("the daemon failed without a word"),
    );
    Err(match text("hint") {
        Some(hint) => e.hint(hint),
        None => e,
    })
}

fn missing(key: &str) -> Error {
    Error::new(
        Kind::Invalid,
        format!("a message on the control socket lacks `{key}`"),
    )
    .hint("command and daemon may be of different versions: restart the daemon")
}

/// A string field.
pub fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value
        .get(key)
        .and_then(Value::as_str)
        .ok_or_else(|| missing(key))
}

/// A number field.
pub fn number(value: &Value, key: &str) -> Result<u64> {
    value
        .get(key)
        .and_then(Value::as_u64)
        .ok_or_else(|| missing(key))
}

/// A truth field; absent is false.
pub fn flag(value: &Value, key: &str) -> bool {
    value.get(key).and_then(Value::as_bool).unwrap_or(false)
}

fn kind_of(word: &str) -> Result<ObjectKind> {
    [
        ObjectKind::Base,
        ObjectKind::Image,
        ObjectKind::Snapshot,
        ObjectKind::Disk,
    ]
    .into_iter()
    .find(|k| k.word() == word)
    .ok_or_else(|| missing("kind"))
}

fn id_of(word: &str) -> Result<Id> {
    Id::parse(word).ok_or_else(|| missing("id"))
}

/// A door by its word.
pub fn via_of(word: &str) -> Result<Via> {
    [Via::Loop, Via::File, Via::Nbd]
        .into_iter()
        .find(|v| v.word() == word)
        .ok_or_else(|| missing("via"))
}

/// An attachment as JSON.
pub fn attached_json(a: &Attached) -> Value {
    json!({
        "name": a.name, "id": a.id.to_string(), "kind": a.kind.word(), "read_only": a.read_only,
        "passthrough": a.passthrough,
        "via": a.via.word(), "device": a.device, "file": a.file, "count": a.count, "size": a.size,
    })
}

/// The inverse of [`attached_json`].
pub fn attached(value: &Value) -> Result<Attached> {
    Ok(Attached {
        name: text(value, "name")?.to_string(),
        id: id_of(text(value, "id")?)?,
        kind: kind_of(text(value, "kind")?)?,
        read_only: flag(value, "read_only"),
        passthrough: flag(value, "passthrough"),
        via: via_of(text(value, "via")?)?,
        device: value
            .get("device")
            .and_then(Value::as_str)
            .map(String::from),
        file: text(value, "file")?.into(),
        count: number(value, "count")? as u32,
        size: number(value, "size")?,
    })
}

/// A base or layer as JSON.
pub fn below_json(below: Below) -> Value {
    let word = match below {
        Below::Base(_) => "base",
        Below::Layer(_) => "layer",
    };
    json!({"kind": word, "id": below.id().to_string()})
}

/// The inverse of [`below_json`].
pub fn below(value: &Value) -> Result<Below> {
    let id = id_of(text(value, "id")?)?;
    Ok(match text(value, "kind")? {
        "base" => Below::Base(id),
        _ => Below::Layer(id),
    })
}

/// An object as JSON.
pub fn object_json(o: &Object) -> Value {
    let parent = o.parent.map(below_json);
    json!({
        "name": o.name, "kind": o.kind.word(), "id": o.id.to_string(), "size": o.size, "parent": parent,
        "created": o.created, "message": o.message,
    })
}

/// The inverse of [`object_json`].
pub fn object(value: &Value) -> Result<Object> {
    let parent = match value.get("parent").filter(|p| !p.is_null()) {
        None => None,
        Some(parent) => Some(below(parent)?),
    };
    Ok(Object {
        name: text(value, "name")?.to_string(),
        kind: kind_of(text(value, "kind")?)?,
        id: id_of(text(value, "id")?)?,
        size: number(value, "size")?,
        parent,
        created: number(value, "created")?,
        message: value
            .get("message")
            .and_then(Value::as_str)
            .map(String::from),
    })
}
