//! Conversations with commands, over the control socket.
//!
//! Always true:
//! - some thread waits for the next conversation, unless there are as many as there may be: no command waits until another one's work is done;
//! - whoever was refused at its first word is asked nothing more, and nothing more of what it says is done.

use super::protocol::{failure, receive, send};
use super::server::Server;
use crate::layer::history::Hold;
use crate::layer::unsettled::Unsettled;
use crate::sys::private;
use serde_json::Value;
use std::io::BufReader;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

/// Most conversations at one time: each is a thread.
const MAX: usize = 256;

/// So many threads stay when their conversations are over and wait for others: to start one takes longer than most answers.
const SPARE: usize = 2;

/// The threads that talk to commands.
#[derive(Default)]
pub(super) struct Threads {
    waiting: usize,
    talking: usize,
}

/// What one conversation is about.
#[derive(Default)]
pub(super) struct Conversation {
    /// The disks that it began to attach or detach.
    pub begun: Vec<String>,
    /// What an answer promised to make durable: done when the answer is on its way. It holds nothing of the disk, which may be detached meanwhile.
    pub unsettled: Option<Arc<Unsettled>>,
    held: Option<Arc<Hold>>,
}

/// Lets a thread wait for conversations.
pub(super) fn listen(server: &Arc<Server>, listener: &Arc<UnixListener>) -> std::io::Result<()> {
    server.threads.lock().waiting += 1;
    let (on, at) = (server.clone(), listener.clone());
    std::thread::Builder::new()
        .name("control".into())
        .spawn(move || wait(&on, &at))
        .map(drop)
        .inspect_err(|_| server.threads.lock().waiting -= 1)
}

fn wait(server: &Arc<Server>, listener: &Arc<UnixListener>) {
    loop {
        let Some(stream) = accept(server, listener) else {
            continue;
        };
        {
            let mut threads = server.threads.lock();
            if threads.talking >= MAX {
                continue;
            }
            threads.talking += 1;
            threads.waiting -= 1;
        }
        if server.threads.lock().waiting == 0
            && let Err(e) = listen(server, listener)
        {
            tracing::warn!("cannot start a thread: {e}");
            let mut threads = server.threads.lock();
            threads.talking -= 1;
            threads.waiting += 1;
            continue;
        }
        let mut conversation = Conversation::default();
        converse(server, stream, &mut conversation);
        for name in conversation.begun {
            server.broken_off(&name);
        }
        server.settled.notify_all();
        server.fit_after();
        let mut threads = server.threads.lock();
        threads.talking -= 1;
        if threads.waiting >= SPARE {
            return;
        }
        threads.waiting += 1;
    }
}

/// The next one who may talk to this server.
fn accept(server: &Server, listener: &UnixListener) -> Option<UnixStream> {
    let stream = match listener.accept() {
        Ok((stream, _)) => stream,
        Err(e) => {
            // Out of descriptors, most likely: others may free some.
            tracing::warn!("cannot accept a conversation: {e}");
            std::thread::sleep(Duration::from_millis(100));
            return None;
        }
    };
    // The mode of the socket keeps others away; this holds also where somebody changed it.
    if let Err(e) = private::check_peer(&stream) {
        tracing::warn!("a conversation was refused: {e}");
        return None;
    }
    // Whoever comes to one that leaves asks again, and reaches the successor.
    (!server.leaving.load(SeqCst)).then_some(stream)
}

/// Answers requests until the other side leaves.
fn converse(server: &Server, stream: UnixStream, conversation: &mut Conversation) {
    let Ok(mut writer) = stream.try_clone() else {
        return;
    };
    let mut reader = BufReader::new(stream);
    loop {
        let request = match receive(&mut reader) {
            Ok(Some(request)) => request,
            Ok(None) => return,
            Err(e) => {
                let _ = send(&mut writer, &failure(&e));
                return;
            }
        };
        server.answering.fetch_add(1, SeqCst);
        // To a server that leaves nothing new is brought: whoever it is finds the successor.
        let ends_something = request["op"]
            .as_str()
            .is_some_and(|op| op.ends_with("-done") || op.ends_with("-undo"));
        if server.leaving.load(SeqCst) && !ends_something {
            server.answering.fetch_sub(1, SeqCst);
            return;
        }
        let said = answer(server, &request, conversation);
        let sent = send(&mut writer, &said);
        // Only now: a server that leaves waits for that.
        server.answering.fetch_sub(1, SeqCst);
        server.settled.notify_all();
        if let Some(unsettled) = conversation.unsettled.take() {
            // An error is met again by the first who changes something.
            drop(unsettled.settle());
        }
        // The next request may be here already.
        let refused = request["op"] == "hello" && said.get("error").is_some();
        if sent.is_err() || refused {
            return;
        }
    }
}

fn answer(server: &Server, request: &Value, conversation: &mut Conversation) -> Value {
    server
        .answer_on_past(request, &mut conversation.held)
        .unwrap_or_else(|| server.answer(request, conversation))
        .unwrap_or_else(|e| failure(&e))
}
