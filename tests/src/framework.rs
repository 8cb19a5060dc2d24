// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a test is.

use clap::ValueEnum;

/// How a test ended.
#[derive(Debug)]
pub enum Outcome {
    Pass,
    /// What was seen and what was expected.
    Fail(String),
    /// The requirement that is not met.
    Skip(String),
}

impl From<Result<(), String>> for Outcome {
    fn from(result: Result<(), String>) -> Self {
        match result {
            Ok(()) => Outcome::Pass,
            Err(message) => Outcome::Fail(message),
        }
    }
}

/// Who runs a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum User {
    /// An ordinary user in the group `dune`.
    Tester,
    /// An ordinary user who is not in the group.
    Outsider,
    Root,
}

impl User {
    pub fn name(self) -> &'static str {
        match self {
            User::Tester => "tester",
            User::Outsider => "outsider",
            User::Root => "root",
        }
    }
}

/// When a test is run; the matrix of `vm/src/matrix.rs` names suites.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Suite {
    /// Every `make test`, on every machine that can run Dune.
    Short,
    /// `make test-long` only.
    Long,
    /// Only where the kernel is built to find mistakes by itself.
    Debug,
    /// Only on machines that cannot run Dune.
    NoVmx,
    /// Only on the machine that has the distribution's programs.
    Programs,
    /// More of them, in `make test-long`.
    ProgramsLong,
    /// Everything at once, at random: one machine.
    Torture,
    /// Tests that make the harness red on purpose.
    Harness,
    /// What only a real CPU, or the kernel of a distribution, has: no machine of the matrix runs it.
    Native,
}

impl Suite {
    pub fn name(self) -> &'static str {
        match self {
            Suite::Short => "short",
            Suite::Long => "long",
            Suite::Debug => "debug",
            Suite::NoVmx => "no-vmx",
            Suite::Programs => "programs",
            Suite::ProgramsLong => "programs-long",
            Suite::Torture => "torture",
            Suite::Harness => "harness",
            Suite::Native => "native",
        }
    }
}

/// What a test cannot do without; unmet, it is skipped with the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code)]
pub enum Need {
    /// At least so many CPUs.
    Cpus(usize),
    /// A word in the flags of /proc/cpuinfo.
    CpuFlag(&'static str),
    /// A path that exists.
    Path(&'static str),
    /// No KVM yet: the module can have VMX for itself. Where Linux lets nobody but KVM turn VMX on, KVM is there from the start.
    OwnVmx,
    /// Syscall user dispatch, which a kernel may be built without (from 7.x on).
    UserDispatch,
    /// No kmemleak: a kernel that has it has KASAN too, which keeps back what was freed, so that counts of free memory say
    /// nothing; kmemleak itself looks for what is left over there.
    NoKmemleak,
}

impl Need {
    /// Why the need is not met here; `None` when it is.
    pub fn unmet(self) -> Option<String> {
        match self {
            Need::Cpus(count) => {
                let here = crate::helpers::online_cpus();
                (here < count).then(|| format!("needs {count} CPUs, has {here}"))
            }
            Need::CpuFlag(flag) => (!crate::helpers::cpu_has(flag)).then(|| format!("the CPU has no {flag}")),
            Need::OwnVmx => crate::kvm::is_loaded().then(|| "KVM has VMX from the start".to_string()),
            Need::UserDispatch => (!crate::user_dispatch::is_there()).then(|| "Linux has no user dispatch".to_string()),
            Need::NoKmemleak => has_kmemleak()
                .then(|| "KASAN keeps back what was freed; kmemleak looks for what is left over".to_string()),
            Need::Path(path) => (!std::path::Path::new(path).exists()).then(|| format!("there is no {path}")),
        }
    }
}

/// Whether this is the kernel that looks for mistakes: kmemleak and KASAN are there together.
fn has_kmemleak() -> bool {
    std::path::Path::new("/sys/kernel/debug/kmemleak").exists()
}

/// One test. Its function runs in a process of its own.
pub struct Test {
    /// A behaviour, in the indicative: `ept_follows_munmap`.
    pub name: &'static str,
    pub suite: Suite,
    pub run_as: User,
    /// Seconds after which it is killed and has failed, on a kernel that does not look for mistakes.
    pub timeout_s: u64,
    /// The variable of the environment that makes it last so many seconds, if there is one.
    pub lasts: Option<&'static str>,
    pub needs: &'static [Need],
    pub body: Body,
}

/// The function of a test, of either kind.
#[derive(Clone, Copy)]
pub enum Body {
    /// Returns how it ended.
    Tells(fn() -> Outcome),
    /// Panics when something is wrong.
    Asserts(fn()),
}

impl Test {
    /// A test of the short suite, run by `tester`, killed after 20 s.
    pub const fn new(name: &'static str, run: fn() -> Outcome) -> Self {
        Self::with(name, Body::Tells(run))
    }

    /// The same, for a function that asserts.
    #[allow(dead_code)]
    pub const fn asserting(name: &'static str, run: fn()) -> Self {
        Self::with(name, Body::Asserts(run))
    }

    const fn with(name: &'static str, body: Body) -> Self {
        Self {
            name,
            suite: Suite::Short,
            run_as: User::Tester,
            timeout_s: 20,
            lasts: None,
            needs: &[],
            body,
        }
    }

    pub const fn suite(self, suite: Suite) -> Self {
        Self { suite, ..self }
    }

    pub const fn run_as(self, run_as: User) -> Self {
        Self { run_as, ..self }
    }

    #[allow(dead_code)]
    pub const fn timeout_s(self, timeout_s: u64) -> Self {
        Self { timeout_s, ..self }
    }

    /// Seconds after which it is killed and has failed. KASAN and lockdep make system calls several times as long.
    pub fn limit_s(&self) -> u64 {
        const SLOWER: u64 = 4;
        let asked_for = self.lasts.map_or(0, |variable| crate::fuzz::setting(variable, 0));
        asked_for + self.timeout_s * if has_kmemleak() { SLOWER } else { 1 }
    }

    /// As long as that variable says: its limit is so much later.
    pub const fn lasts(self, variable: &'static str) -> Self {
        Self {
            lasts: Some(variable),
            ..self
        }
    }

    #[allow(dead_code)]
    pub const fn needs(self, needs: &'static [Need]) -> Self {
        Self { needs, ..self }
    }
}

/// Ends a test that returns [`Outcome`] with a failure when the condition does
/// not hold.
#[macro_export]
macro_rules! check {
    ($condition:expr $(,)?) => {
        if !$condition {
            return $crate::framework::Outcome::Fail(
                format!("{}:{}: {}", file!(), line!(), stringify!($condition)));
        }
    };
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return $crate::framework::Outcome::Fail(
                format!("{}:{}: {}", file!(), line!(), format_args!($($message)+)));
        }
    };
}

/// Ends a test with a failure when two values differ; shows both.
#[macro_export]
macro_rules! check_eq {
    ($left:expr, $right:expr $(,)?) => {{
        let (left, right) = (&$left, &$right);
        if left != right {
            return $crate::framework::Outcome::Fail(format!(
                "{}:{}: {} is {:?}, expected {} = {:?}",
                file!(),
                line!(),
                stringify!($left),
                left,
                stringify!($right),
                right
            ));
        }
    }};
}

/// Takes the value out of a `Result`, or ends the test with the error.
#[macro_export]
macro_rules! check_ok {
    ($result:expr $(,)?) => {
        match $result {
            Ok(value) => value,
            Err(error) => {
                return $crate::framework::Outcome::Fail(format!(
                    "{}:{}: {}: {error}",
                    file!(),
                    line!(),
                    stringify!($result)
                ));
            }
        }
    };
}
