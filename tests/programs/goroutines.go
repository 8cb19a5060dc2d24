// SPDX-License-Identifier: MIT OR Apache-2.0

// A cgo program that uses what Go's runtime has of its own: threads made by bare clone, goroutines that are preempted by SIGURG,
// collections of garbage meanwhile, signals, faults that become panics, children. Its output is the same each time.
package main

/*
#include <pthread.h>
#include <stdint.h>

static uint64_t sum(uint64_t n) {
	uint64_t s = 0;
	for (uint64_t i = 0; i < n; i++)
		s += i * i;
	return s;
}

static void *thread(void *argument) {
	*(uint64_t *)argument = sum(1000);
	return 0;
}

static uint64_t sum_on_a_thread(void) {
	pthread_t id;
	uint64_t result = 0;
	if (pthread_create(&id, 0, thread, &result))
		return 0;
	pthread_join(id, 0);
	return result;
}
*/
import "C"

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

type node struct {
	next  *node
	value uint64
	bytes []byte
}

// 100 goroutines that allocate, call C and yield.
func many() {
	var group sync.WaitGroup
	sums := make([]uint64, 100)
	for i := range sums {
		group.Add(1)
		go func(i int) {
			defer group.Done()
			var list *node
			for j := 0; j < 200; j++ {
				list = &node{list, uint64(i * j), make([]byte, 200)}
				if j%50 == 0 {
					sums[i] += uint64(C.sum(C.uint64_t(i)))
					runtime.Gosched()
				}
			}
			for ; list != nil; list = list.next {
				sums[i] += list.value + uint64(len(list.bytes))
			}
		}(i)
	}
	group.Wait()
	total := uint64(0)
	for _, sum := range sums {
		total += sum
	}
	fmt.Println("many", total)
}

// A collection has to stop goroutines that never yield: only a signal does.
func preempted() {
	var stop, running uint32
	var group sync.WaitGroup
	for i := 0; i < 2; i++ {
		group.Add(1)
		go func() {
			defer group.Done()
			atomic.AddUint32(&running, 1)
			for atomic.LoadUint32(&stop) == 0 {
			}
		}()
	}
	for atomic.LoadUint32(&running) < 2 {
		time.Sleep(time.Millisecond)
	}
	for i := 0; i < 3; i++ {
		runtime.GC()
	}
	atomic.StoreUint32(&stop, 1)
	group.Wait()
	fmt.Println("preempted")
}

func faults() {
	for i := 0; i < 3; i++ {
		func() {
			defer func() { fmt.Println("recovered:", recover()) }()
			var nothing *node
			fmt.Println(nothing.value)
		}()
	}
	func() {
		defer func() { fmt.Println("recovered:", recover()) }()
		zero := len(os.Args) - 1
		fmt.Println(1 / zero)
	}()
}

func signals() {
	arrived := make(chan os.Signal, 8)
	signal.Notify(arrived, syscall.SIGUSR1)
	for i := 0; i < 3; i++ {
		syscall.Kill(syscall.Getpid(), syscall.SIGUSR1)
		fmt.Println("signal", <-arrived)
	}
}

func children() {
	output, err := exec.Command("/bin/bash", "-c", "echo child $((6 * 7))").Output()
	fmt.Print(string(output))
	fmt.Println(err)
	err = exec.Command("/bin/bash", "-c", "exit 3").Run()
	fmt.Println(err)
}

func main() {
	runtime.GOMAXPROCS(4)
	many()
	fmt.Println("C", C.sum(1000), C.sum_on_a_thread())
	preempted()
	faults()
	signals()
	children()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	fmt.Println("collected", stats.NumGC >= 3)
	os.Exit(9)
}
