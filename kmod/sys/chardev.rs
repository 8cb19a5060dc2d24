// SPDX-License-Identifier: GPL-2.0

//! The device node and its files (linux/device.h, linux/fs.h, linux/anon_inodes.h).

use super::bindings;
use super::mm::Vma;
use super::seq::Seq;
use super::thread;
use core::cell::UnsafeCell;
use core::ffi::c_void;
use core::mem::zeroed;
use core::ptr::NonNull;
use kernel::error::to_result;
use kernel::ffi::c_int;
use kernel::ffi::c_long;
use kernel::ffi::c_uint;
use kernel::ffi::c_ulong;
use kernel::prelude::*;

/// What a file of the device does.
pub(crate) trait FileOps: Sized + Send + Sync {
    /// Opens for the calling process; the value lives until [`FileOps::release`].
    fn open() -> Result<NonNull<Self>>;
    /// The last reference to a file is gone.
    ///
    /// # Safety
    ///
    /// `this` comes from [`FileOps::open`], and is given back once for each time that it was given.
    unsafe fn release(this: NonNull<Self>);
    /// The request that is made again and again.
    const HOT: u32;
    /// That one: what `ioctl(2)` returns, an error as −errno. Errors go through [`Caller::fail`].
    fn hot(&self, arg: u64, caller: Caller) -> isize;
    /// `ioctl(2)`, all others; what is returned is what the caller sees.
    fn ioctl(&self, cmd: u32, arg: u64) -> Result<u64>;
    /// The request that a `read(2)` of so many bytes stands for, the buffer's address being its argument.
    fn request_of(count: u64) -> Result<u32>;
    /// `mmap(2)`.
    fn mmap(&self, vma: &Vma) -> Result;
    /// What `/proc/PID/fdinfo/FD` shows; may not sleep.
    fn show(&self, to: &Seq);
}

/// Who makes the hot request: by which file, or null where the user's work was just done.
#[derive(Clone, Copy)]
pub(crate) struct Caller(*mut bindings::file);

impl Caller {
    /// Linux' work for a thread on its way to user mode was just done, and is not to be asked for again.
    #[inline(always)]
    pub(crate) fn worked(self) -> bool {
        self.0.is_null()
    }

    /// What the request returns for this error. [`wants_user_work`]: it is made again behind [`thread::do_user_work`], which
    /// may do anything, closing the file included, and so must not find a request half done.
    #[cold]
    #[inline(never)]
    pub(crate) fn fail<T: FileOps>(self, arg: u64, error: Error) -> isize {
        if error.to_errno() != -ERESTARTSYS || self.worked() {
            return error.to_errno() as isize;
        }
        // The caller only borrows the file from the table of file descriptors, out of which the work may take it (io_uring does).
        // SAFETY: It lives until here; the reference is given back below, in a way that ends nothing before the return to
        // user mode.
        let data = unsafe {
            bindings::dune_get_file(self.0);
            &*bindings::dune_file_private(self.0).cast::<T>()
        };
        thread::do_user_work();
        let answer = data.hot(arg, Self(core::ptr::null_mut()));
        // SAFETY: The reference of above.
        unsafe { bindings::fput(self.0) };
        answer
    }
}

/// The error by which [`FileOps::hot`] asks for it. User space never sees it.
pub(crate) fn wants_user_work() -> Error {
    Error::from_errno(-ERESTARTSYS)
}

const ERESTARTSYS: i32 = 512;

/// The registered device; dropping takes the node away.
///
/// A character device of its own, not a misc device: those are opened one at a time on the whole machine, and opening ours
/// waits for the opener's mmap_lock.
pub(crate) struct CharDevice(());

struct Fops(UnsafeCell<bindings::file_operations>);

// SAFETY: Written once, in `register`, before anybody else sees it.
unsafe impl Sync for Fops {}

static FOPS: Fops = Fops(UnsafeCell::new(
    // SAFETY: All of its fields are pointers, optional functions or integers.
    unsafe { zeroed() },
));

impl CharDevice {
    /// Makes `/dev/dune` with mode 0600; user space gives it to its group.
    pub(crate) fn register<T: FileOps>() -> Result<Self> {
        // SAFETY: Called once, from module init; nobody has the table yet.
        unsafe {
            let fops = &mut *FOPS.0.get();
            fops.owner = bindings::dune_this_module();
            fops.open = Some(open::<T>);
            fops.release = Some(release::<T>);
            fops.unlocked_ioctl = Some(ioctl::<T>);
            fops.read_iter = Some(read_iter::<T>);
            fops.mmap = Some(mmap::<T>);
            fops.show_fdinfo = Some(show_fdinfo::<T>);
        }
        // SAFETY: The table lives as long as the module.
        to_result(unsafe { bindings::dune_chrdev_register(FOPS.0.get()) })?;
        Ok(Self(()))
    }
}

impl Drop for CharDevice {
    fn drop(&mut self) {
        // SAFETY: Registered in `register`.
        unsafe { bindings::dune_chrdev_unregister() };
    }
}

/// A new file, and a file descriptor (close-on-exec) of the calling process for it.
pub(crate) fn new_fd<T: FileOps>() -> Result<i32> {
    let data = T::open()?;
    // SAFETY: The table lives as long as the module, which the file keeps alive; `release` takes `data` back.
    let fd = unsafe {
        bindings::anon_inode_getfd(
            c"[dune]".as_ptr().cast(),
            FOPS.0.get(),
            data.as_ptr().cast(),
            (O_RDWR | O_CLOEXEC) as c_int,
        )
    };
    if fd < 0 {
        // SAFETY: No file was made, so `release` will not run.
        unsafe { T::release(data) };
    }
    to_result(fd.min(0))?;
    Ok(fd)
}

const O_RDWR: u32 = 0o2;
const O_CLOEXEC: u32 = 0o2000000;

unsafe extern "C" fn open<T: FileOps>(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    match T::open() {
        Ok(data) => {
            // SAFETY: The file is being opened; nobody else uses it.
            unsafe { bindings::dune_file_set_private(file, data.as_ptr().cast::<c_void>()) };
            0
        }
        Err(e) => e.to_errno(),
    }
}

unsafe extern "C" fn release<T: FileOps>(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    // SAFETY: Set in `open` or `new_fd`; `release` runs once, when nobody uses the file any more.
    unsafe { T::release(NonNull::new_unchecked(bindings::dune_file_private(file).cast())) };
    0
}

unsafe extern "C" fn ioctl<T: FileOps>(file: *mut bindings::file, cmd: c_uint, arg: c_ulong) -> c_long {
    // SAFETY: Set in `open` or `new_fd`; the file, and so the data, lives during the call.
    let data = unsafe { &*bindings::dune_file_private(file).cast::<T>() };
    if cmd == T::HOT {
        return data.hot(arg as u64, Caller(file)) as c_long;
    }
    other_ioctl(data, cmd, arg as u64)
}

#[inline(never)]
fn other_ioctl<T: FileOps>(data: &T, cmd: u32, arg: u64) -> c_long {
    match data.ioctl(cmd, arg) {
        Ok(v) => v as c_long,
        Err(e) => e.to_errno() as c_long,
    }
}

/// `read(2)`, for who may not make other calls. Only as this call: io_uring would make it in the middle of another request of
/// the same thread, or in a thread of its own.
unsafe extern "C" fn read_iter<T: FileOps>(iocb: *mut bindings::kiocb, to: *mut bindings::iov_iter) -> isize {
    let (mut file, mut buffer, mut count) = (core::ptr::null_mut(), 0, 0);
    // SAFETY: Both are the caller's, and alive.
    if !unsafe { bindings::dune_plain_read(iocb, to, &mut file, &mut buffer, &mut count) } {
        return EINVAL.to_errno() as isize;
    }
    match T::request_of(count) {
        // SAFETY: The file that is read.
        Ok(cmd) => unsafe { ioctl::<T>(file, cmd, buffer as c_ulong) as isize },
        Err(e) => e.to_errno() as isize,
    }
}

unsafe extern "C" fn mmap<T: FileOps>(file: *mut bindings::file, vma: *mut bindings::vm_area_struct) -> c_int {
    // SAFETY: As in `ioctl`; the VMA is being set up for us.
    let (data, vma) = unsafe { (&*bindings::dune_file_private(file).cast::<T>(), Vma::from_raw(vma)) };
    match data.mmap(&vma) {
        Ok(()) => 0,
        Err(e) => e.to_errno(),
    }
}

unsafe extern "C" fn show_fdinfo<T: FileOps>(to: *mut bindings::seq_file, file: *mut bindings::file) {
    // SAFETY: As in `ioctl`; the file that is being read is open during the call.
    let (data, to) = unsafe {
        let data = &*bindings::dune_file_private(file).cast::<T>();
        (data, Seq::from_raw(NonNull::new_unchecked(to)))
    };
    data.show(&to);
}
