//! The lines of a tree: `├─ `, `└─ `, `│  `.

/// For nodes in the order of a walk from the roots down, each with its depth, the strokes that stand
/// before it: none at depth 0.
pub fn strokes(depths: &[usize]) -> Vec<String> {
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
    fn a_branch_of_another_root_is_not_joined() {
        assert_eq!(strokes(&[0, 1, 0, 1]), ["", "└─ ", "", "└─ "]);
        assert!(strokes(&[]).is_empty());
    }
}
