//! Medians and ratios. Pure.

/// The middle of the values (the mean of the two middle ones), `None` of none.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[half]),
        _ => Some((sorted[half - 1] + sorted[half]) / 2.0),
    }
}

/// The smallest and the largest of the values.
pub fn range(values: &[f64]) -> Option<(f64, f64)> {
    let finite = || values.iter().copied().filter(|v| v.is_finite());
    Some((finite().reduce(f64::min)?, finite().reduce(f64::max)?))
}

/// The median of the ratios of values that were taken in the same round: `(round, value)` each. What changes from
/// round to round, because others use the machine, changes both and falls out.
pub fn paired_ratio(mine: &[(u32, f64)], other: &[(u32, f64)]) -> Option<f64> {
    let of_round = |round: u32| {
        let all: Vec<f64> = other.iter().filter(|o| o.0 == round).map(|o| o.1).collect();
        median(&all)
    };
    let ratios: Vec<f64> = mine
        .iter()
        .filter_map(|(round, value)| of_round(*round).map(|o| value / o))
        .collect();
    median(&ratios)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_is_found() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[f64::NAN]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(range(&[3.0, f64::NAN, 1.0]), Some((1.0, 3.0)));
    }

    #[test]
    fn ratios_are_of_one_round() {
        // The machine was twice as fast in round 2; the ratio of medians of unlike rounds would be wrong.
        let mine = [(1, 50.0), (2, 100.0), (3, 10.0)];
        let raw = [(1, 100.0), (2, 200.0)];
        assert_eq!(paired_ratio(&mine, &raw), Some(0.5));
        assert_eq!(paired_ratio(&mine, &[]), None);
        // Nothing is divided by zero.
        assert_eq!(paired_ratio(&[(1, 1.0)], &[(1, 0.0)]), None);
    }
}
