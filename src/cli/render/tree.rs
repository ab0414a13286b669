//! The lines of a tree: `├─ `, `└─ `, `│  `.

/// Levels that are drawn. What is deeper stands below these, with its depth: a chain of ten thousand snapshots would be as wide as it is long.
const LEVELS: usize = 32;

/// For nodes in the order of a walk from the roots down, each with its depth, the strokes that stand
/// before it: none at depth 0.
pub fn strokes(depths: &[usize]) -> Vec<String> {
    let drawn: Vec<usize> = depths.iter().map(|depth| *depth.min(&LEVELS)).collect();
    let mut out = strokes_of(&drawn);
    for (stroke, &depth) in out.iter_mut().zip(depths) {
        if depth > LEVELS {
            stroke.push_str(&format!("({depth}) "));
        }
    }
    out
}

fn strokes_of(depths: &[usize]) -> Vec<String> {
    let mut out = vec![String::new(); depths.len()];
    // From the bottom up: `more[d]` tells whether a node of depth `d` still follows under the same parent.
    let mut more: Vec<bool> = Vec::new();
    for (i, &depth) in depths.iter().enumerate().rev() {
        more.resize(depth + 1, false);
        for (d, &follows) in more.iter().enumerate().skip(1) {
            out[i].push_str(match (d == depth, follows) {
                (true, true) => "├─ ",
                (true, false) => "└─ ",
                (false, true) => "│  ",
                (false, false) => "   ",
            });
        }
        more[depth] = true;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strokes_join_what_belongs_together() {
        // a(b(c(d)), e, f(g)), h(i)
        let depths = [0, 1, 2, 3, 1, 1, 2, 0, 1];
        let lines: Vec<String> = strokes(&depths)
            .into_iter()
            .zip("abcdefghi".chars())
            .map(|(stroke, name)| format!("{stroke}{name}"))
            .collect();
        assert_eq!(
            lines,
            [
                "a",
                "├─ b",
                "│  └─ c",
                "│     └─ d",
                "├─ e",
                "└─ f",
                "   └─ g",
                "h",
                "└─ i",
            ]
        );
    }

    #[test]
    fn a_deep_chain_is_not_as_wide_as_it_is_long() {
        let depths: Vec<usize> = (0..10_000).collect();
        let lines = strokes(&depths);
        assert!(lines.iter().all(|line| line.chars().count() < 110));
        assert!(lines[32].ends_with("  ├─ "), "{}", lines[32]);
        assert!(lines[33].ends_with("  ├─ (33) "), "{}", lines[33]);
        assert!(lines[9_999].ends_with("  └─ (9999) "), "{}", lines[9_999]);
    }

    #[test]
    fn a_branch_of_another_root_is_not_joined() {
        assert_eq!(strokes(&[0, 1, 0, 1]), ["", "└─ ", "", "└─ "]);
        assert!(strokes(&[]).is_empty());
    }
}
