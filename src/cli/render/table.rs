//! Tables without borders: columns two spaces apart, or tab-separated for scripts.

/// To which side the cells of a column lean.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// Rows of cells under headings.
pub struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table. A table whose headings are all empty has no heading line.
    pub fn new(columns: impl IntoIterator<Item = (String, Align)>) -> Table {
        Table {
            columns: columns.into_iter().collect(),
            rows: Vec::new(),
        }
    }
    /// Adds a row: one cell for each column.
    pub fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.columns.len());
        self.rows.push(cells.iter().map(|c| clean(c)).collect());
    }
    /// Are there no rows?
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
    /// For people: a heading line (if `heading`), cells padded to the widest of their column.
    pub fn text(&self, heading: bool) -> String {
        let names: Vec<&str> = self.columns.iter().map(|(name, _)| name.as_str()).collect();
        let heading = heading && names.iter().any(|name| !name.is_empty());
        let widths: Vec<usize> = (0..names.len())
            .map(|i| {
                let cells = self.rows.iter().map(|row| width(&row[i])).max();
                let name = if heading { width(names[i]) } else { 0 };
                cells.unwrap_or(0).max(name)
            })
            .collect();
        let mut out = String::new();
        if heading {
            self.line(&mut out, &names, &widths);
        }
        for row in &self.rows {
            let cells: Vec<&str> = row.iter().map(String::as_str).collect();
            self.line(&mut out, &cells, &widths);
        }
        out
    }
    fn line(&self, out: &mut String, cells: &[&str], widths: &[usize]) {
        let start = out.len();
        for (i, cell) in cells.iter().enumerate() {
            if i > 0 {
                out.push_str("  ");
            }
            let pad = " ".repeat(widths[i] - width(cell));
            match self.columns[i].1 {
                Align::Left => {
                    out.push_str(cell);
                    out.push_str(&pad);
                }
                Align::Right => {
                    out.push_str(&pad);
                    out.push_str(cell);
                }
            }
        }
        let kept = out[start..].trim_end().len();
        out.truncate(start + kept);
        out.push('\n');
    }
    /// For scripts: no heading, cells separated by one tab.
    pub fn script(&self) -> String {
        let mut out = String::new();
        for row in &self.rows {
            out.push_str(&row.join("\t"));
            out.push('\n');
        }
        out
    }
}

/// The text without what could move a terminal's cursor or break a row: control characters become
/// spaces.
pub fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// Columns that the text takes on a terminal, near enough: one for each character.
fn width(text: &str) -> usize {
    text.chars().count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Table {
        let mut table = Table::new([
            ("NAME".to_string(), Align::Left),
            ("SIZE".to_string(), Align::Right),
            ("MESSAGE".to_string(), Align::Left),
        ]);
        table.row(vec!["debian".into(), "2.0 GiB".into(), String::new()]);
        table.row(vec![
            "bücher".into(),
            "4.0 KiB".into(),
            "a\tb\x1b[2J".into(),
        ]);
        table
    }

    #[test]
    fn columns_line_up_and_nothing_trails() {
        assert_eq!(
            sample().text(true),
            "NAME       SIZE  MESSAGE\ndebian  2.0 GiB\nbücher  4.0 KiB  a b [2J\n"
        );
    }

    #[test]
    fn scripts_get_tabs_and_no_heading() {
        assert_eq!(
            sample().script(),
            "debian\t2.0 GiB\t\nbücher\t4.0 KiB\ta b [2J\n"
        );
    }
}
