// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads KTAP, the test result format of the Linux kernel.

/// How one test ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    Passed,
    Failed,
    Skipped(String),
}

/// One result line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestResult {
    pub number: usize,
    pub name: String,
    pub status: Status,
    /// The `N` of `# N ms`.
    pub milliseconds: Option<u64>,
}

/// What a KTAP stream said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The N of `1..N`.
    pub planned: Option<usize>,
    pub results: Vec<TestResult>,
}

impl Report {
    /// Reads the top-level results of a stream; other lines are ignored.
    pub fn parse(text: &str) -> Self {
        let mut report = Self::default();
        for line in text.lines() {
            if let Some(plan) = line.strip_prefix("1..") {
                if let Ok(count) = plan.trim().parse() {
                    report.planned = Some(count);
                }
            } else if let Some(result) = parse_result(line) {
                report.results.push(result);
            }
        }
        report
    }

    /// Returns what is wrong with the stream itself: no plan, missing, double
    /// or misnumbered results. Failed tests are not a matter of this.
    pub fn defects(&self) -> Vec<String> {
        let mut defects = Vec::new();
        match self.planned {
            None => defects.push("no plan line (1..N) arrived".to_string()),
            Some(0) => defects.push("the plan holds no test".to_string()),
            Some(count) if count != self.results.len() => {
                defects.push(format!("{count} results were planned, {} arrived", self.results.len()))
            }
            Some(_) => {}
        }
        for (index, result) in self.results.iter().enumerate() {
            if result.number != index + 1 {
                defects.push(format!(
                    "result {} ({}) carries the number {}",
                    index + 1,
                    result.name,
                    result.number
                ));
            }
        }
        defects
    }

    /// How many results have each status: passed, failed, skipped.
    pub fn counts(&self) -> (usize, usize, usize) {
        let passed = self.count(|status| *status == Status::Passed);
        let failed = self.count(|status| *status == Status::Failed);
        (passed, failed, self.results.len() - passed - failed)
    }

    /// The tests that took longest, in guest time.
    pub fn slowest(&self, count: usize) -> Vec<&TestResult> {
        let mut results: Vec<&TestResult> = self.results.iter().collect();
        results.sort_by_key(|result| std::cmp::Reverse(result.milliseconds));
        results.truncate(count);
        results
    }

    fn count(&self, wanted: impl Fn(&Status) -> bool) -> usize {
        self.results.iter().filter(|r| wanted(&r.status)).count()
    }
}

fn parse_result(line: &str) -> Option<TestResult> {
    let (ok, rest) = match line.strip_prefix("not ok ") {
        Some(rest) => (false, rest),
        None => (true, line.strip_prefix("ok ")?),
    };
    let (number, rest) = rest.split_once(' ')?;
    let number = number.parse().ok()?;
    let (name, directive) = match rest.split_once('#') {
        Some((name, directive)) => (name, directive.trim()),
        None => (rest, ""),
    };
    let name = name.trim().trim_start_matches("- ").to_string();
    let status = match (ok, directive.strip_prefix("SKIP")) {
        (_, Some(reason)) => Status::Skipped(reason.trim().to_string()),
        (true, None) => Status::Passed,
        (false, None) => Status::Failed,
    };
    let milliseconds = directive.strip_suffix(" ms").and_then(|text| text.parse().ok());
    Some(TestResult {
        number,
        name,
        status,
        milliseconds,
    })
}

#[cfg(test)]
mod tests {
    use super::Report;
    use super::Status;

    const GOOD: &str = "KTAP version 1\n1..3\n# a.. diagnostics\nok 1 first # 12 ms\n\
                        not ok 2 second\nok 3 third # SKIP no VMX\n";

    #[test]
    fn results_are_read() {
        let report = Report::parse(GOOD);
        assert_eq!(report.planned, Some(3));
        assert_eq!(report.results[0].name, "first");
        assert_eq!(report.results[0].milliseconds, Some(12));
        assert_eq!(report.results[1].status, Status::Failed);
        assert_eq!(report.results[2].status, Status::Skipped("no VMX".into()));
        assert_eq!(report.counts(), (1, 1, 1));
        assert!(report.defects().is_empty());
    }

    #[test]
    fn a_missing_result_is_a_defect() {
        let text = GOOD.replace("not ok 2 second\n", "");
        assert_eq!(Report::parse(&text).defects().len(), 2);
        let text = GOOD.replace("ok 3 third # SKIP no VMX\n", "");
        assert_eq!(Report::parse(&text).defects().len(), 1);
    }

    #[test]
    fn a_missing_or_empty_plan_is_a_defect() {
        assert_eq!(Report::parse("ok 1 x\n").defects().len(), 1);
        assert_eq!(Report::parse("1..0\n").defects().len(), 1);
        assert_eq!(Report::parse("").defects().len(), 1);
    }

    #[test]
    fn a_result_given_twice_is_a_defect() {
        let text = "1..2\nok 1 x\nok 1 x\n";
        assert_eq!(Report::parse(text).defects().len(), 1);
    }
}
