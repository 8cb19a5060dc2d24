// SPDX-License-Identifier: MIT OR Apache-2.0
//! Loading and unloading the module.

use crate::check;
use crate::check_eq;
use crate::check_ok;
use crate::framework::Outcome;
use crate::framework::Test;
use crate::framework::User;
use crate::helpers;

pub const TESTS: &[Test] = &[Test::new("module_unloads_and_loads_again", module_unloads_and_loads).run_as(User::Root)];

fn module_unloads_and_loads() -> Outcome {
    check!(helpers::module_is_loaded());
    let ended = check_ok!(helpers::unload_module());
    check_eq!(ended.status, 0);
    check!(!helpers::module_is_loaded());
    let ended = check_ok!(helpers::load_module(&[]));
    check!(ended.status == 0, "{ended:?}");
    check!(helpers::module_is_loaded());
    Outcome::Pass
}
