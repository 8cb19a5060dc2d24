// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table of machines that `make test` and `make test-long` go through.

/// When a row is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    Always,
    Long,
}

/// What a row must come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// All results arrived, none failed, the machine and its log are clean.
    Green,
    /// The harness' own tests: exactly one fault for each text, which holds it.
    Red(&'static [&'static str]),
}

/// One boot of one machine.
#[derive(Clone, Debug)]
pub struct Row {
    pub name: String,
    pub when: When,
    pub kernel: &'static str,
    pub cpu_model: &'static str,
    pub cpus: u32,
    pub gpa_bits: Option<u32>,
    /// A variable for the module's build, `DUNE_MUTATE=retry`.
    pub variant: Option<&'static str>,
    pub memory_mib: u32,
    /// More of the kernel's command line.
    pub append: &'static str,
    /// Whether init inserts the module.
    pub load: bool,
    pub command: &'static str,
    /// Guest seconds that a torture lasts, where [`TORTURE_SECONDS`] does not say another number.
    pub torture_s: Option<u64>,
    /// Of the host's time, which a busy host stretches: for a machine that hangs. A test's own limit is guest time.
    pub timeout_s: u64,
    /// Whether the programs of `programs.rs` go along.
    pub debian_programs: bool,
    /// Whether the harness goes along, to which the emulated machine is the real one.
    pub harness: bool,
    pub expect: Expect,
}

/// Variables of the environment of who runs the matrix: how long the rows with a torture take, and what their seed is.
pub const TORTURE_SECONDS: &str = "DUNE_TORTURE_SECONDS";
pub const TORTURE_SEED: &str = "DUNE_TORTURE_SEED";

impl Row {
    /// Takes over those variables, which `variable` reads: for each second that a torture is longer the machine has
    /// [`HOST_S_PER_GUEST_S`] more.
    pub fn lengthen(&mut self, variable: impl Fn(&str) -> Option<u64>) -> String {
        let Some(own) = self.torture_s else {
            return self.command.to_string();
        };
        let seconds = variable(TORTURE_SECONDS).unwrap_or(own);
        self.timeout_s += HOST_S_PER_GUEST_S * seconds.saturating_sub(own);
        let seed = variable(TORTURE_SEED).unwrap_or(1);
        format!("{TORTURE_SECONDS}={seconds} {TORTURE_SEED}={seed} {}", self.command)
    }

    /// Whether `dune.ko` has to be in the image: init loads it, or a test does.
    pub fn needs_module(&self) -> bool {
        self.load || self.expect == Expect::Green
    }
}

const HASWELL: &str = "corei7_haswell_4770";
const SANDY_BRIDGE: &str = "corei7_sandy_bridge_2600k";
const LYNNFIELD: &str = "corei5_lynnfield_750";
const BROADWELL: &str = "broadwell_ult";

/// Boots with [`TIGER_LAKE_APPEND`].
const TIGER_LAKE: &str = "tigerlake";
/// What Bochs tells wrong of it, so that Linux warns: as many threads as cores (HT), no size of PKRU's state (PKU), and the same
/// size of compacted state whatever is in it (XSAVES, XSAVEC). And Linux' own warning where it mitigates ITS in a module.
const TIGER_LAKE_APPEND: &str = "clearcpuid=ht,pku,xsaves,xsavec indirect_target_selection=off";
const TIGER_LAKE_WITHOUT_MITIGATIONS: &str = "clearcpuid=ht,pku,xsaves,xsavec mitigations=off";
/// The same for the kernel `pkeys`, which knows what PKRU's state is like.
const KEYS_APPEND: &str = "clearcpuid=ht,xsaves,xsavec indirect_target_selection=off";

/// A guest second may last so long on a busy host.
const HOST_S_PER_GUEST_S: u64 = 60;

/// MiB of a machine.
const MEMORY: u32 = 2048;
/// Enough for what the debug kernel runs, whose kmemleak reads all of it twice.
const LITTLE_MEMORY: u32 = 1024;

const SHORT: &str = "dune-tests run --suite short";
/// And two of the long suite that each machine on the kernel `test` has to pass.
const SHORT_AND_LOADING: &str = "dune-tests run --suite short --with load_unload_100_times,no_leak_after_1000_runs";
const SHORT_AND_LONG: &str = "dune-tests run --suite short --suite long";
/// Without the long suite: on the debug kernel kmemleak looks for what is left over.
const SHORT_AND_DEBUG: &str = "dune-tests run --suite short --suite debug --with load_unload_100_times";
/// What a CPU with a poorer EPT may do to Dune; the whole short suite runs there in `make test-long`.
const CORE: &str = "dune-tests run --only hello_enters_and_leaves,libstd_runs_in_dune_mode,registers_survive_syscall,\
     fpu_avx_and_mxcsr_survive,divide_error_handled,page_fault_handled_without_vm_exit,nested_page_fault_three_deep,\
     ept_follows_munmap,ept_follows_mprotect,ept_follows_madvise_dontneed,ept_follows_fork_and_copy_on_write,\
     ept_follows_files,ept_follows_collapse_and_split,ept_follows_swap,ept_maps_hugetlb,retry_closes_the_race,\
     idle_pages_are_told_from_used_ones,written_pages_are_told_from_others,thp_mapped_as_2m,gigabytes_of_mmap,\
     own_page_table_maps_pages_elsewhere,slot_comes_back_without_a_mapping_only,given_back_slot_shows_nothing_old,\
     recycled_gib_starts_anew,threads_are_in_dune_mode,fork_goes_on_in_dune_mode,handlers_run_in_dune_mode,\
     faults_become_signals_with_true_siginfo,raw_guest_runs,vm_entry_failure_is_reported,\
     state_beyond_the_policy_is_refused,triple_fault_is_reported,port_io_faults_whatever_the_guest_allows_itself,\
     control_registers_obey_the_policy,msrs_obey_the_policy,emulated_instructions_obey_privilege,\
     the_guests_own_instructions_run,every_vector_reaches_the_guest";
/// As an ordinary user, as one who is not in the group, with the module and its scripts in their places, in namespaces.
/// Where a module is loaded, it serves and stays, or makes way. What runs in between is judged by the harness that runs there;
/// the end is for the one outside.
const NATIVE_PATH: &str = "dune-load && dune-vm boot --native --user tester -- hello >/dev/null && dune-unload && \
     dune-vm boot --native --user tester -- hello >/dev/null && dune-load && dune-vm native 'dune-tests run \
     --only hello_enters_and_leaves,libstd_runs_in_dune_mode,registers_survive_syscall,ept_follows_munmap' && \
     dune-vm boot --native -- 'dune-tests run --only hello_enters_and_leaves,outsider_is_told_the_group,\
     tester_is_unprivileged_and_in_the_group,outsider_is_not_in_the_group,unload_while_running_is_busy,\
     load_unload_100_times,user_and_pid_namespaces_hold_dune_threads'";
/// A warning on the machine itself, which the harness that runs there must see.
const NATIVE_WARNING: &str =
    "dune-vm native 'echo \"<6>WARNING: on purpose\" >/dev/kmsg; dune-tests run --only harness_passes'";
/// What SMAP, which Haswell has not, means to: code at CPL3 and what copies from and to it.
macro_rules! tests_of_cpl3 {
    () => {
        "dune-tests run --only hello_enters_and_leaves,libstd_runs_in_dune_mode,registers_survive_syscall,\
         cpl0_accesses_cpl3_by_user_slice_only,user_slice_copies_what_cpl3_may_access,cpl3_sees_only_its_pages,\
         cpl0_does_not_execute_pages_of_cpl3,system_call_of_cpl3_comes_to_the_host,cpl3_faults_come_to_the_host,\
         flags_of_cpl3_stay_there,signals_are_delivered_while_at_cpl3,cpl3_cannot_keep_the_cpu,raw_guest_runs,\
         control_registers_obey_the_policy,handlers_run_in_dune_mode,faults_become_signals_with_true_siginfo,\
         every_action_of_a_signal_everywhere"
    };
}
const CPL3: &str = tests_of_cpl3!();
/// The same, and protection keys. Not KVM, which finds what Bochs tells of PKRU's state, and warns.
const KEYS: &str = concat!(
    tests_of_cpl3!(),
    ",protection_keys_bind_cpl3_and_cpl0,protection_keys_are_kept_apart,cpl3_that_gives_up_all_keys_ends_nobody,\
     keys_of_the_process_bind_its_system_calls,registers_survive_fault,fpu_avx_and_mxcsr_survive,\
     extended_state_is_kept_apart,handlers_take_exceptions_of_cpl3,visits_to_cpl3_nest,threads_visit_cpl3_at_once,\
     threads_are_in_dune_mode,fork_goes_on_in_dune_mode,documentation_examples_run,\
     host_state_survives_a_hostile_guest,state_beyond_the_policy_is_refused,emulated_instructions_obey_privilege,\
     fuzz_guest,fuzz_abi,hostile_plugin_gets_errors_only"
);
/// What libdune and its C ABI are tested by, on the debug kernel (issue 4, "Shown by" 1).
const LIBRARY: &str = "dune-tests run --suite short --topic bounce,c_abi,compartment,documentation,examples,\
     extended,hook,paging,scope,spaces,stacks,trap,user";
/// What the slice is made of (issue 2, "Shown by" 2).
const SLICE: &str = "dune-tests run --suite debug --with hello_enters_and_leaves,libstd_runs_in_dune_mode,\
     registers_survive_syscall,registers_survive_fault,red_zone_survives_fault_and_syscall,fpu_avx_and_mxcsr_survive,\
     page_fault_handled_without_vm_exit,divide_error_handled,nested_page_fault_three_deep,nesting_limit_is_reported,\
     fault_with_unmapped_program_stack,ept_follows_munmap,ept_follows_mprotect,ept_follows_madvise_dontneed,\
     ept_keeps_neighbours_on_munmap,retry_closes_the_race,thp_mapped_as_2m,vdso_clock_gettime_works,brk_past_4g,\
     pie_and_aslr,stack_astride_a_slot_edge,gigabytes_of_mmap,enter_cost_is_independent_of_mappings,\
     sigkill_ends_guest_loop_at_once,two_processes_at_once,migrates_between_cpus,preempted_by_busy_neighbour,\
     guest_time_is_user_time,vm_entry_failure_is_reported,triple_fault_is_reported,vmcall_at_cpl3_is_refused,\
     mov_cr8_and_port_io_are_refused,bad_calls_are_refused,unload_while_running_is_busy,load_unload_100_times,\
     no_leak_after_100_runs";
/// The debug kernel is slow: besides its own suite, one test of each kind; more in `make test-long`.
const DEBUG: &str = "dune-tests run --suite debug --with hello_enters_and_leaves,registers_survive_syscall,\
     divide_error_handled,page_fault_handled_without_vm_exit,ept_follows_munmap,thp_mapped_as_2m,\
     sigkill_ends_guest_loop_at_once,two_processes_at_once,vm_entry_failure_is_reported,bad_calls_are_refused,\
     tracepoints_tell_of_exits";
/// On a kernel that mitigates nothing and makes no i386 calls: other code around the entry, for which a thousand guests are
/// enough; `haswell-2cpu` has four times as many, `make test-long` 100,000.
const WITHOUT_MITIGATIONS: &str =
    "DUNE_FUZZ_CASES=1000 dune-tests run --only hello_enters_and_leaves,libstd_runs_in_dune_mode,\
     registers_survive_syscall,raw_guest_runs,host_state_survives_a_hostile_guest,fuzz_guest,\
     int_0x80_is_what_it_is_natively,int_0x80_with_sigsegv_blocked,faults_become_signals_with_true_siginfo";
const NO_VMX: &str = "dune-tests run --suite no-vmx";
const TORTURE: &str = "dune-tests run --suite torture";

/// All rows, the slowest first, so that two workers end at about the same time.
pub fn rows(long: bool) -> Vec<Row> {
    let mut rows = Vec::new();
    if long {
        rows.extend(full_product());
        for cpus in [2, 1] {
            rows.push(Row {
                when: When::Long,
                cpus,
                timeout_s: 3600,
                ..green(&format!("long-broadwell-{cpus}cpu"), BROADWELL, SHORT)
            });
            for (name, cpu_model, append) in [
                ("haswell", HASWELL, "mitigations=off"),
                ("sandy-bridge", SANDY_BRIDGE, "mitigations=off"),
                ("broadwell", BROADWELL, "mitigations=off"),
                ("tiger-lake", TIGER_LAKE, TIGER_LAKE_WITHOUT_MITIGATIONS),
            ] {
                rows.push(Row {
                    when: When::Long,
                    cpus,
                    append,
                    timeout_s: 3600,
                    ..green(&format!("long-without-mitigations-{name}-{cpus}cpu"), cpu_model, SHORT)
                });
            }
            rows.push(Row {
                when: When::Long,
                cpus,
                append: TIGER_LAKE_APPEND,
                timeout_s: 3600,
                ..green(&format!("long-tiger-lake-{cpus}cpu"), TIGER_LAKE, SHORT)
            });
        }
        rows.push(Row {
            when: When::Long,
            kernel: "pkeys",
            append: KEYS_APPEND,
            timeout_s: 3600,
            ..green("long-protection-keys", TIGER_LAKE, KEYS)
        });
        for (name, cpu_model, cpus, append) in [
            ("haswell-2cpu", HASWELL, 2, ""),
            ("tiger-lake-2cpu", TIGER_LAKE, 2, TIGER_LAKE_APPEND),
            ("broadwell-1cpu", BROADWELL, 1, ""),
            ("sandy-bridge-1cpu", SANDY_BRIDGE, 1, ""),
        ] {
            rows.push(Row {
                when: When::Long,
                kernel: "debug",
                cpus,
                append,
                memory_mib: LITTLE_MEMORY,
                timeout_s: 7200,
                ..green(&format!("long-library-{name}-debug"), cpu_model, LIBRARY)
            });
        }
        rows.push(Row {
            when: When::Long,
            memory_mib: 3072,
            ..green(
                "long-hugetlb-1g",
                HASWELL,
                "dune-tests run --only ept_maps_hugetlb_of_1g",
            )
        });
        rows.push(Row {
            when: When::Long,
            timeout_s: 3600,
            ..green("long-no-unrestricted-guest", LYNNFIELD, SHORT)
        });
        rows.push(Row {
            when: When::Long,
            kernel: "debug",
            memory_mib: LITTLE_MEMORY,
            timeout_s: 3600,
            ..green(
                "long-enter-without-memory",
                HASWELL,
                "dune-tests run --only each_call_may_find_no_memory,every_allocation_of_enter_may_fail,\
                 every_allocation_inside_may_fail",
            )
        });
        rows.push(Row {
            when: When::Long,
            kernel: "debug",
            cpus: 2,
            memory_mib: LITTLE_MEMORY,
            torture_s: Some(80),
            timeout_s: 3600,
            ..green("long-torture-debug", HASWELL, TORTURE)
        });
        rows.push(Row {
            when: When::Long,
            cpus: 2,
            debian_programs: true,
            timeout_s: 3600,
            ..green("long-debian-programs", HASWELL, "dune-tests run --suite programs-long")
        });
    }
    // Machines on which Dune runs.
    rows.push(Row {
        cpus: 2,
        ..green("haswell-2cpu", HASWELL, SHORT)
    });
    rows.push(Row {
        kernel: "debug",
        memory_mib: LITTLE_MEMORY,
        ..green("debug-kernel", HASWELL, DEBUG)
    });
    rows.push(Row {
        gpa_bits: Some(36),
        ..green("sandy-bridge-36bit", SANDY_BRIDGE, CORE)
    });
    rows.push(green("no-unrestricted-guest", LYNNFIELD, CORE));
    rows.push(Row {
        append: "mitigations=off ia32_emulation=0",
        ..green("without-mitigations", HASWELL, WITHOUT_MITIGATIONS)
    });
    rows.push(green("smap", BROADWELL, CPL3));
    // Neither XSAVE nor FSGSBASE: ways of their own to CPL3 and back.
    rows.push(green("without-xsave", LYNNFIELD, CPL3));
    // What `make run` and `make test` do on a machine with VT-x.
    rows.push(Row {
        load: false,
        harness: true,
        ..green("native-path", HASWELL, NATIVE_PATH)
    });
    rows.push(Row {
        load: false,
        harness: true,
        expect: Expect::Red(&["WARNING: on purpose", "token", "ended with status 1"]),
        ..green("self-native-warning", HASWELL, NATIVE_WARNING)
    });
    // Programs that know nothing of Dune.
    rows.push(Row {
        cpus: 2,
        debian_programs: true,
        ..green("debian-programs", HASWELL, "dune-tests run --suite programs")
    });
    // Machines on which it does not, and says so.
    for (name, model) in [("no-vmx", "p4_prescott_celeron_336"), ("no-ept", "core2_penryn_t9600")] {
        rows.push(Row {
            load: false,
            ..green(name, model, NO_VMX)
        });
    }
    // A safeguard compiled out: its test must notice.
    for (name, cpu_model, variant, command, faults) in MUTANTS {
        rows.push(Row {
            cpus: 2,
            variant: Some(variant),
            expect: Expect::Red(faults),
            ..green(name, cpu_model, command)
        });
    }
    // Another kernel is started: what it writes arrived, and nothing of what the first one writes at its end.
    for (name, command) in [
        ("kexec", "dune-tests run --only next_kernel_finds_vmx_off"),
        (
            "kexec-beside-kvm",
            "dune-tests run --only next_kernel_finds_vmx_off_beside_kvm",
        ),
    ] {
        rows.push(Row {
            expect: Expect::Red(&["not ok the_next_kernel_runs", "the emulator stopped", "token"]),
            ..green(name, HASWELL, command)
        });
    }
    // Everything at once, at random.
    rows.push(Row {
        cpus: 2,
        torture_s: Some(8),
        ..green("torture", HASWELL, TORTURE)
    });
    if long {
        // The same after a crash.
        for (name, cpus, command) in [
            ("crash", 2, "dune-tests run --only crash_kernel_finds_vmx_off"),
            (
                "crash-beside-kvm",
                1,
                "dune-tests run --only crash_kernel_finds_vmx_off_beside_kvm",
            ),
        ] {
            rows.push(Row {
                when: When::Long,
                cpus,
                append: "crashkernel=16M",
                expect: Expect::Red(&["not ok the_next_kernel_runs", "the emulator stopped", "token"]),
                ..green(name, HASWELL, command)
            });
        }
    }
    // Mistakes of the module's on purpose: that no log shows any means something.
    for (name, when, kernel, command, faults) in MISTAKES {
        if long || *when == When::Always {
            rows.push(Row {
                when: *when,
                kernel,
                memory_mib: LITTLE_MEMORY,
                expect: Expect::Red(faults),
                ..green(name, HASWELL, command)
            });
        }
    }
    // The harness' other tests. None needs the module.
    for (name, timeout_s, command, faults) in SELF_TESTS {
        rows.push(Row {
            load: false,
            timeout_s: *timeout_s,
            expect: Expect::Red(faults),
            ..green(name, HASWELL, command)
        });
    }
    rows
}

/// Name of the row, CPU model, what the module is built with, command, what the harness must complain of.
type Mutant = (
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    &'static [&'static str],
);

/// What is to be seen of a kernel that panics on a line with `$what` in it.
macro_rules! panics_on {
    ($what:literal) => {
        &[
            "the guest's kernel panicked",
            $what,
            "1 results were planned, 0 arrived",
            "token",
        ]
    };
}

const MUTANTS: &[Mutant] = &[
    (
        "mutant-without-retry",
        HASWELL,
        "DUNE_MUTATE=retry",
        "dune-tests run --only retry_closes_the_race,violations_settled_at_once_lose_no_race",
        &[
            "not ok retry_closes_the_race",
            "not ok violations_settled_at_once_lose_no_race",
        ],
    ),
    (
        "mutant-slot-looked-up-first",
        HASWELL,
        "DUNE_MUTATE=slot",
        "dune-tests run --only violations_of_a_slot_given_back_lose_no_race",
        &["not ok violations_of_a_slot_given_back_lose_no_race"],
    ),
    (
        "mutant-without-invept",
        HASWELL,
        "DUNE_MUTATE=invept",
        "dune-tests run --only ept_follows_munmap,other_threads_are_shot_down",
        &["not ok ept_follows_munmap", "not ok other_threads_are_shot_down"],
    ),
    (
        "mutant-flush-behind-the-lock",
        HASWELL,
        "DUNE_MUTATE=flush",
        "dune-tests run --only second_invalidation_waits_for_the_flush",
        &["not ok second_invalidation_waits_for_the_flush"],
    ),
    (
        "mutant-enters-with-msrs-of-kvm",
        HASWELL,
        "DUNE_MUTATE=user_return",
        "dune-tests run --only kvm_guest_keeps_its_msrs",
        &["not ok kvm_guest_keeps_its_msrs"],
    ),
    (
        "mutant-leaks-a-page",
        HASWELL,
        "DUNE_MUTATE=leak",
        "dune-tests run --only no_leak_after_100_runs",
        &["not ok no_leak_after_100_runs"],
    ),
    (
        "mutant-leaves-gs-base",
        // A CPU without FSGSBASE.
        SANDY_BRIDGE,
        "DUNE_MUTATE=swapgs",
        "dune-tests run --only swapgs_stays_in_the_guest",
        &["not ok swapgs_stays_in_the_guest"],
    ),
    (
        "mutant-leaves-lstar",
        HASWELL,
        "DUNE_MUTATE=lstar",
        "dune-tests run --only hello_enters_and_leaves",
        panics_on!("double fault"),
    ),
    (
        "mutant-forgets-sections-behind-a-shortcut",
        HASWELL,
        "DUNE_MUTATE=section",
        "dune-tests run --only sections_behind_a_shortcut_are_aborted",
        &["not ok sections_behind_a_shortcut_are_aborted"],
    ),
    (
        "mutant-keeps-rseq-sections",
        HASWELL,
        "DUNE_MUTATE=rseq",
        "dune-tests run --only rseq_sections_are_aborted",
        &["not ok rseq_sections_are_aborted"],
    ),
];

/// Name of the row, when it runs, kernel, command, what the harness must complain of.
type Mistake = (&'static str, When, &'static str, &'static str, &'static [&'static str]);

const MISTAKES: &[Mistake] = &[
    (
        "self-oops",
        When::Always,
        "test",
        "dune-tests run --only harness_oopses_the_kernel",
        panics_on!("Oops: "),
    ),
    (
        "self-warning",
        When::Always,
        "test",
        "dune-tests run --only harness_warns_in_the_kernel",
        panics_on!("WARNING: "),
    ),
    (
        "self-kasan",
        When::Long,
        "debug",
        "dune-tests run --only harness_writes_out_of_bounds",
        panics_on!("KASAN: "),
    ),
    (
        "self-kmemleak",
        When::Long,
        "debug",
        "dune-tests run --only harness_leaks_memory_of_the_kernel",
        &["unreferenced object"],
    ),
];

/// Name of the row, seconds that the machine has, command, what the harness must complain of.
type SelfTest = (&'static str, u64, &'static str, &'static [&'static str]);

const SELF_TESTS: &[SelfTest] = &[
    (
        "self-failing-tests",
        300,
        "dune-tests run --only harness_passes,harness_fails,harness_panics,harness_exits_early,harness_hangs",
        &[
            "harness_fails",
            "harness_panics",
            "harness_exits_early",
            "harness_hangs",
        ],
    ),
    (
        "self-hanging-machine",
        10,
        "dune-tests run --only harness_hangs_the_machine",
        &["was stopped after", "1 results were planned, 0 arrived", "token"],
    ),
    (
        "self-missing-result",
        300,
        "DUNE_TESTS_STOP_AFTER=1 dune-tests run --only harness_passes,tester_is_unprivileged_and_in_the_group",
        &["2 results were planned, 1 arrived", "token"],
    ),
    (
        "self-stale-token",
        300,
        "dune_token=0123456789abcdef dune-tests run --only harness_passes",
        &["token"],
    ),
    (
        "self-warning-in-log",
        300,
        "echo '<6>WARNING: on purpose' >/dev/kmsg; dune-tests run --only harness_passes",
        &["WARNING: on purpose"],
    ),
    (
        "self-program-fails",
        300,
        "dune-tests run --only harness_passes; exit 3",
        &["ended with status 3"],
    ),
];

fn green(name: &str, cpu_model: &'static str, command: &'static str) -> Row {
    Row {
        name: name.to_string(),
        when: When::Always,
        kernel: "test",
        cpu_model,
        cpus: 1,
        gpa_bits: None,
        variant: None,
        memory_mib: MEMORY,
        append: "",
        load: true,
        command,
        torture_s: None,
        timeout_s: 1800,
        debian_programs: false,
        harness: false,
        expect: Expect::Green,
    }
}

/// 2 models × 1, 2 CPUs × 36, 40 bits of guest-physical address. All 8 run the short suite on the test kernel, and
/// what loads the module and enters often, two opposite ones all of the long suite. On the debug kernel, which is
/// slow, one of them runs the short suite and the debug kernel's own, the others the slice.
fn full_product() -> Vec<Row> {
    let mut rows = Vec::new();
    for kernel in ["debug", "test"] {
        for cpus in [2, 1] {
            for (short_name, cpu_model) in [("haswell", HASWELL), ("sandy-bridge", SANDY_BRIDGE)] {
                for bits in [36, 40] {
                    let (command, memory_mib) = match (kernel, cpu_model, cpus, bits) {
                        ("debug", HASWELL, 2, 40) => (SHORT_AND_DEBUG, MEMORY),
                        ("debug", ..) => (SLICE, LITTLE_MEMORY),
                        (_, HASWELL, 2, 40) | (_, SANDY_BRIDGE, 1, 36) => (SHORT_AND_LONG, MEMORY),
                        _ => (SHORT_AND_LOADING, MEMORY),
                    };
                    rows.push(Row {
                        when: When::Long,
                        kernel,
                        cpus,
                        gpa_bits: Some(bits),
                        memory_mib,
                        timeout_s: 14_400,
                        ..green(
                            &format!("long-{short_name}-{cpus}cpu-{bits}bit-{kernel}"),
                            cpu_model,
                            command,
                        )
                    });
                }
            }
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::rows;
    use super::Expect;
    use super::When;
    use super::TORTURE_SECONDS;

    #[test]
    fn names_are_unique() {
        let rows = rows(true);
        let names: BTreeSet<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names.len(), rows.len());
    }

    #[test]
    fn long_is_short_and_forty_two_more() {
        assert_eq!(rows(true).len(), rows(false).len() + 42);
    }

    #[test]
    fn both_kernels_meet_all_eight_machines() {
        for kernel in ["test", "debug"] {
            let machines: BTreeSet<_> = rows(true)
                .into_iter()
                .filter(|row| row.when == When::Long && row.kernel == kernel && row.gpa_bits.is_some())
                .map(|row| (row.cpu_model, row.cpus, row.gpa_bits))
                .collect();
            assert_eq!(machines.len(), 8, "{kernel}: {machines:?}");
        }
    }

    #[test]
    fn torture_lasts_as_long_as_asked() {
        let row = |name: &str| rows(true).into_iter().find(|row| row.name == name).unwrap();
        let hour = |name: &str| (name == TORTURE_SECONDS).then_some(3600);
        let (mut plain, mut asked) = (row("torture"), row("torture"));
        assert!(plain
            .lengthen(|_| None)
            .starts_with("DUNE_TORTURE_SECONDS=8 DUNE_TORTURE_SEED=1 dune-tests "));
        assert!(asked
            .lengthen(hour)
            .starts_with("DUNE_TORTURE_SECONDS=3600 DUNE_TORTURE_SEED=1 dune-tests "));
        assert_eq!(asked.timeout_s - plain.timeout_s, 60 * (3600 - 8));
        let (mut other, before) = (row("smap"), row("smap").timeout_s);
        assert_eq!(other.lengthen(hour), other.command);
        assert_eq!(other.timeout_s, before);
    }

    #[test]
    fn every_red_row_says_why() {
        for row in rows(true) {
            if let Expect::Red(faults) = row.expect {
                assert!(!faults.is_empty(), "{}", row.name);
            }
        }
    }
}
