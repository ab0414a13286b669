//! The terminal: data on stdout, talk and progress on stderr, and questions.

use crate::{
    cli::{
        Stop,
        render::{
            error,
            json::{DamageDoc, Document},
            size::Units,
        },
    },
    error::{Error, Kind},
    store::{Damage, Progress},
    sys::signals,
};
use clap::builder::styling::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::{
    fmt::Display,
    io::{self, BufRead, IsTerminal, Write},
    sync::Mutex,
    time::{Duration, Instant},
};

/// When to use colour.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum ColorMode {
    /// On a terminal, unless NO_COLOR is set
    #[default]
    Auto,
    /// Also into files and pipes
    Always,
    /// Nowhere
    Never,
}

impl ColorMode {
    fn applies(self, terminal: bool) -> bool {
        let set = |name| std::env::var_os(name).is_some_and(|v| !v.is_empty());
        match self {
            ColorMode::Always => true,
            ColorMode::Never => false,
            ColorMode::Auto => terminal && !set("NO_COLOR") && !dumb_terminal(),
        }
    }
}

fn dumb_terminal() -> bool {
    std::env::var_os("TERM").is_some_and(|term| term == "dumb")
}

/// How long work shows how far it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum ProgressMode {
    /// A bar, if stderr is a terminal
    #[default]
    Auto,
    /// A line every second
    Plain,
    /// Not at all
    None,
}

/// What is set in which colour.
#[derive(Clone, Copy)]
pub enum Paint {
    /// `error:`, `fail`.
    Bad,
    /// `warning:`, `warn`.
    Doubtful,
    /// `ok`, what is attached.
    Good,
    /// `hint:`.
    Hint,
}

impl Paint {
    fn style(self) -> Style {
        match self {
            Paint::Bad => AnsiColor::Red.on_default().bold(),
            Paint::Doubtful => AnsiColor::Yellow.on_default().bold(),
            Paint::Good => AnsiColor::Green.on_default(),
            Paint::Hint => AnsiColor::Cyan.on_default(),
        }
    }
    fn on(self, text: &str, colour: bool) -> String {
        if colour {
            let style = self.style();
            format!("{style}{text}{style:#}")
        } else {
            text.to_string()
        }
    }
}

/// How this run talks.
pub struct Ui {
    /// One JSON document instead of text.
    pub json: bool,
    /// No talk, only data and errors.
    pub quiet: bool,
    /// Units of sizes.
    pub units: Units,
    /// `--yes`.
    pub yes: bool,
    color: ColorMode,
    progress: ProgressMode,
}

impl Ui {
    /// A way to talk.
    pub fn new(
        json: bool,
        quiet: bool,
        yes: bool,
        units: Units,
        color: ColorMode,
        progress: ProgressMode,
    ) -> Ui {
        Ui {
            json,
            quiet,
            units,
            yes,
            color,
            progress,
        }
    }
    /// A size for people.
    pub fn size(&self, bytes: u64) -> String {
        self.units.show(bytes)
    }
    /// Colours text for stdout.
    pub fn paint(&self, paint: Paint, text: &str) -> String {
        paint.on(text, self.color.applies(io::stdout().is_terminal()))
    }
    fn paint_err(&self, paint: Paint, text: &str) -> String {
        paint.on(text, self.color.applies(io::stderr().is_terminal()))
    }
    /// Writes data to stdout.
    pub fn data(&self, text: impl AsRef<[u8]>) -> Result<(), Stop> {
        let mut out = io::stdout().lock();
        let written = out.write_all(text.as_ref()).and_then(|()| out.flush());
        written.map_err(|e| Stop::output(&e))
    }
    /// Writes the JSON document of a command to stdout.
    pub fn document<T: Serialize>(&self, body: T) -> Result<(), Stop> {
        self.data(Document::new(body).text())
    }
    /// Under `--json` writes the document, else the text.
    pub fn answer<T: Serialize>(&self, body: T, text: impl FnOnce() -> String) -> Result<(), Stop> {
        if self.json {
            self.document(body)
        } else {
            self.data(text())
        }
    }
    /// Says what was done, on stderr: not under `--quiet`, not under `--json`.
    pub fn talk(&self, text: impl Display) {
        if !self.quiet && !self.json {
            say(&format!("{text}\n"));
        }
    }
    /// Warns of something, on stderr.
    pub fn warn(&self, text: impl Display) {
        if !self.quiet {
            let word = self.paint_err(Paint::Doubtful, "warning:");
            say(&format!("{word} {text}\n"));
        }
    }
    /// What is damaged, after all that is sound was shown: told on stderr (a JSON document has it), and by the exit code.
    pub fn damage(&self, damaged: &[Damage]) -> Result<(), Stop> {
        let all = DamageDoc::all(damaged);
        if all.is_empty() {
            return Ok(());
        }
        if !self.json {
            for DamageDoc { name, message } in &all {
                self.warn(visible(&format!("{name} is damaged: {message}")));
            }
            let word = self.paint_err(Paint::Hint, "hint:");
            let advice =
                "`forkdisk check` lists all damage; what is not named here is not affected";
            say(&format!("  {word} {advice}\n"));
        }
        Err(Stop::Code(Kind::Corrupt.exit_code()))
    }
    /// Shows an error.
    pub fn error(&self, error: &Error) {
        if self.json {
            say(&format!("{}\n", error::json_text(error)));
            return;
        }
        let mut hints = error::hint(error).split('\n').map(visible);
        let mut text = self.paint_err(Paint::Bad, "error:");
        text.push_str(&format!(" {}\n", visible(&error.to_string())));
        let word = self.paint_err(Paint::Hint, "hint:");
        if let Some(first) = hints.next() {
            text.push_str(&format!("  {word} {first}\n"));
        }
        for more in hints {
            text.push_str(&format!("        {more}\n"));
        }
        say(&text);
    }
    /// Shows what would be done and asks whether to. Without a terminal only `--yes` says so.
    pub fn confirm(&self, what: &str, question: &str) -> Result<(), Stop> {
        if self.yes {
            self.talk(what.trim_end());
            return Ok(());
        }
        if !self.json {
            say(what);
        }
        if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
            return Err(Error::new(
                Kind::Invalid,
                "this needs a yes, and there is no terminal to ask on",
            )
            .hint("--yes goes on without asking, --dry-run only shows what would be done")
            .into());
        }
        say(&format!("{question} [y/N] "));
        let mut answer = String::new();
        let read = io::stdin().lock().read_line(&mut answer);
        match (read, answer.trim().to_ascii_lowercase().as_str()) {
            (Ok(1..), "y" | "yes") => Ok(()),
            _ => Err(Error::new(Kind::Interrupted, "nothing was done")
                .hint("answer `y`, or use --yes")
                .into()),
        }
    }
    /// A display for long work that goes in steps.
    pub fn steps(&self) -> Steps {
        let terminal = io::stderr().is_terminal() && !dumb_terminal();
        let wanted = self.progress == ProgressMode::Auto && terminal && !self.quiet && !self.json;
        let bar = wanted.then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            let template = "{bar:24}  {percent:>3} %  {elapsed} gone, {eta} left  {wide_msg}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("━╸─"));
            }
            bar
        });
        Steps {
            bar,
            lines: self.progress == ProgressMode::Plain && !self.quiet,
        }
    }
    /// A display for long work called `label`.
    pub fn progress(&self, label: &str) -> Box<dyn Progress> {
        let terminal = io::stderr().is_terminal() && !dumb_terminal();
        match self.progress {
            _ if self.quiet => Box::new(Silent),
            ProgressMode::Auto if terminal && !self.json => Box::new(Bar::new(label)),
            ProgressMode::Plain => Box::new(Lines::new(label, self.units)),
            ProgressMode::Auto | ProgressMode::None => Box::new(Silent),
        }
    }
}

/// How far work in steps is: a bar on a terminal, a line for each step under `--progress plain`.
pub struct Steps {
    bar: Option<ProgressBar>,
    lines: bool,
}

impl Steps {
    /// `done` of `total` steps are done, the next is `doing`.
    pub fn step(&self, done: u64, total: u64, doing: &str) {
        if self.lines {
            say(&format!("{doing}: {done} of {total}\n"));
        }
        let Some(bar) = &self.bar else { return };
        if bar.length() != Some(total) {
            // Another kind of steps begins: what the former ones took says nothing of these.
            bar.reset();
            bar.set_length(total);
        }
        bar.set_position(done);
        bar.set_message(doing.to_string());
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Text on one line: names and paths that come from elsewhere must not steer the terminal.
fn visible(text: &str) -> String {
    let escape = |c: char| match c.is_control() {
        true => c.escape_default().to_string(),
        false => c.to_string(),
    };
    text.chars().map(escape).collect()
}

/// Writes to stderr; there is nobody to tell if that fails.
fn say(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

/// No display; only the wish to cancel gets through.
struct Silent;
impl Progress for Silent {
    fn update(&self, _: u64, _: u64) -> bool {
        !signals::caught()
    }
}

/// A bar on the terminal, gone when the work is.
struct Bar(ProgressBar);

impl Bar {
    fn new(label: &str) -> Bar {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_message(label.to_string());
        Bar(bar)
    }
}

impl Progress for Bar {
    fn update(&self, done: u64, total: u64) -> bool {
        if total > 0 && self.0.length() != Some(total) {
            self.0.set_length(total);
            let template = "{msg}  {bar:24}  {percent:>3} %  {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}  {eta} left";
            if let Ok(style) = ProgressStyle::with_template(template) {
                self.0.set_style(style.progress_chars("━╸─"));
            }
        } else if total == 0 && self.0.position() == 0 {
            let template = "{msg}  {spinner}  {binary_bytes}  {binary_bytes_per_sec}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                self.0.set_style(style);
            }
        }
        self.0.set_position(done);
        !signals::caught()
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// A line on stderr every second.
struct Lines {
    label: String,
    units: Units,
    next: Mutex<Instant>,
}

impl Lines {
    fn new(label: &str, units: Units) -> Lines {
        Lines {
            label: label.to_string(),
            units,
            next: Mutex::new(Instant::now()),
        }
    }
}

impl Progress for Lines {
    fn update(&self, done: u64, total: u64) -> bool {
        let mut next = self.next.lock().unwrap_or_else(|e| e.into_inner());
        let now = Instant::now();
        if now >= *next || (total > 0 && done == total) {
            *next = now + Duration::from_secs(1);
            let (label, shown) = (&self.label, self.units.show(done));
            if total > 0 {
                let percent = u128::from(done) * 100 / u128::from(total);
                let total = self.units.show(total);
                say(&format!("{label}: {percent} %, {shown} of {total}\n"));
            } else {
                say(&format!("{label}: {shown}\n"));
            }
        }
        !signals::caught()
    }
}
