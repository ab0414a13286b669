//! Many commands at once.

use crate::rig::*;
use std::{
    process::Child, process::Stdio, sync::atomic::AtomicU32, sync::atomic::Ordering::SeqCst,
};

fn start(w: &World, args: &[&str]) -> Child {
    let mut command = w.command(args);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn end(child: Child) -> Out {
    child.wait_with_output().unwrap().into()
}

#[test]
fn one_name_is_made_once() {
    if !root() {
        return;
    }
    let w = World::with_base();
    let image = w.sparse("i.img", 1 << 20);
    for (round, args) in [
        &["create", "x", "--from", "base"][..],
        &["import", s(&image), "x"],
    ]
    .into_iter()
    .enumerate()
    {
        let all: Vec<Child> = (0..8).map(|_| start(&w, args)).collect();
        let mut codes: Vec<i32> = all.into_iter().map(|c| end(c).code).collect();
        codes.sort();
        assert_eq!(codes, [0, 13, 13, 13, 13, 13, 13, 13], "{round}");
        w.ok(["rm", "x"]);
        assert_eq!(w.run(["check"]).code, 0);
    }
    // A new store, made by all at once.
    let w = World::new();
    let image = w.sparse("i.img", 1 << 20);
    let names: Vec<String> = (0..8).map(|i| format!("b{i}")).collect();
    let all: Vec<Child> = names
        .iter()
        .map(|n| start(&w, &["import", s(&image), n]))
        .collect();
    for child in all {
        let out = end(child);
        assert_eq!(out.code, 0, "{out:?}");
    }
    assert_eq!(w.names(), names);
    w.finish();
}

#[test]
fn twenty_of_each_at_once() {
    if !root() {
        return;
    }
    let w = World::with_base();
    let names: Vec<String> = (0..20).map(|i| format!("d{i:02}")).collect();
    let each = |make: &dyn Fn(&str) -> Vec<String>| {
        let all: Vec<Child> = names
            .iter()
            .map(|n| start(&w, &make(n).iter().map(String::as_str).collect::<Vec<_>>()))
            .collect();
        for child in all {
            let out = end(child);
            assert_eq!(out.code, 0, "{out:?}\n{}", w.log());
            w.note(&out.stdout);
        }
    };
    let words = |words: &[&str]| words.iter().map(|w| w.to_string()).collect::<Vec<_>>();
    each(&|n| words(&["create", n, "--from", "base"]));
    // The first of them starts the daemon for all.
    each(&|n| words(&["attach", n, "--mount", s(&w.mkdir(n))]));
    assert_eq!(w.attached(), names);
    each(&|n| words(&["snapshot", &format!("{n}@s")]));
    each(&|n| words(&["detach", n]));
    assert_eq!(w.attached(), [""; 0]);
    each(&|n| words(&["attach", "base", "--mount", s(&w.mkdir(n))]));
    assert_eq!(w.loops().len(), 1, "shared");
    each(&|n| words(&["detach", s(&w.path(n))]));
    each(&|n| words(&["rm", "-r", "--yes", n]));
    assert_eq!(w.names(), ["base"]);
    w.finish();
}

/// One disk attached by all: one gets it.
#[test]
fn one_disk_is_attached_once() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    for _ in 0..3 {
        let all: Vec<Child> = (0..6).map(|_| start(&w, &["attach", "d"])).collect();
        let won = AtomicU32::new(0);
        for child in all {
            let out = end(child);
            w.note(&out.stdout);
            match out.code {
                0 => drop(won.fetch_add(1, SeqCst)),
                code => assert_eq!(code, 11, "{out:?}"),
            }
        }
        assert_eq!(won.into_inner(), 1);
        let all: Vec<Child> = (0..6).map(|_| start(&w, &["detach", "d"])).collect();
        let codes: Vec<i32> = all.into_iter().map(|c| end(c).code).collect();
        assert_eq!(codes.iter().filter(|c| **c == 0).count(), 1, "{codes:?}");
        assert!(codes.iter().all(|c| [0, 11, 12].contains(c)), "{codes:?}");
    }
    // Shared ones: everybody gets it.
    w.ok(["snapshot", "d@s"]);
    let all: Vec<Child> = (0..6).map(|_| start(&w, &["attach", "d@s"])).collect();
    let devices: Vec<Out> = all.into_iter().map(end).collect();
    for out in &devices {
        assert_eq!(out.code, 0, "{out:?}");
        assert_eq!(out.stdout, devices[0].stdout);
    }
    w.note(&devices[0].stdout);
    let all: Vec<Child> = (0..6).map(|_| start(&w, &["detach", "d@s"])).collect();
    for child in all {
        let out = end(child);
        assert_eq!(out.code, 0, "{out:?}");
    }
    w.finish();
}
