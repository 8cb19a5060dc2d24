// SPDX-License-Identifier: MIT OR Apache-2.0

import java.io.IOException;
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.List;
import java.util.TreeMap;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.atomic.AtomicBoolean;

/**
 * What a Java virtual machine has of its own: threads that allocate while G1 collects, safepoints that stop code which never
 * calls, null pointers and stack overflows that become exceptions by way of SIGSEGV, compilation meanwhile, children. Its
 * output is the same each time.
 */
public class Collected {
    private static final class Node {
        final Node next;
        final byte[] bytes;

        Node(Node next, int value) {
            this.next = next;
            bytes = new byte[100 + value % 50];
        }
    }

    /** Lists that live for a while, in threads: the heap is filled some times over. */
    private static void allocate() throws Exception {
        ExecutorService threads = Executors.newFixedThreadPool(4);
        List<Future<Long>> sums = new ArrayList<>();
        ConcurrentHashMap<Integer, String> shared = new ConcurrentHashMap<>();
        for (int i = 0; i < 16; i++) {
            final int number = i;
            sums.add(threads.submit(() -> {
                long sum = 0;
                for (int round = 0; round < 10; round++) {
                    Node list = null;
                    for (int j = 0; j < 1500; j++) {
                        list = new Node(list, number * j);
                        shared.merge(j, "x", (a, b) -> a.length() > 20 ? "" : a + b);
                    }
                    for (; list != null; list = list.next) {
                        sum += list.bytes.length;
                    }
                }
                return sum;
            }));
        }
        long total = 0;
        for (Future<Long> sum : sums) {
            total += sum.get();
        }
        threads.shutdown();
        System.out.println("allocated " + total + " " + shared.size());
    }

    /** Loops without a call stop for a collection all the same. */
    private static void safepoints() throws Exception {
        AtomicBoolean stop = new AtomicBoolean();
        long[] counts = new long[2];
        Thread[] threads = new Thread[2];
        for (int i = 0; i < threads.length; i++) {
            final int number = i;
            threads[i] = new Thread(() -> {
                long count = 0;
                while (!stop.get()) {
                    count++;
                }
                counts[number] = count;
            });
            threads[i].start();
        }
        for (int i = 0; i < 3; i++) {
            Thread.sleep(5);
            System.gc();
        }
        stop.set(true);
        for (Thread thread : threads) {
            thread.join();
        }
        System.out.println("stopped " + (counts[0] > 0 && counts[1] > 0));
    }

    private static int length(byte[] bytes) {
        return bytes.length;
    }

    /** Where the code is compiled, nothing tests for null: the access faults. */
    private static void nulls() {
        int lengths = 0;
        byte[] some = new byte[3];
        for (int i = 0; i < 20000; i++) {
            lengths += length(some);
        }
        int caught = 0;
        for (int i = 0; i < 50; i++) {
            try {
                lengths += length(i % 2 == 0 ? null : some);
            } catch (NullPointerException exception) {
                caught++;
            }
        }
        System.out.println("null " + lengths + " " + caught);
    }

    private static int depth(int n) {
        return depth(n + 1) + 1;
    }

    private static void overflows() throws Exception {
        for (int i = 0; i < 2; i++) {
            try {
                System.out.println(depth(0));
            } catch (StackOverflowError error) {
                System.out.println("overflow");
            }
        }
        Thread thread = new Thread(null, () -> {
            try {
                System.out.println(depth(0));
            } catch (StackOverflowError error) {
                System.out.println("overflow of a thread");
            }
        }, "small", 200_000);
        thread.start();
        thread.join();
        int zero = new int[0].length;
        try {
            System.out.println(1 / zero);
        } catch (ArithmeticException exception) {
            System.out.println(exception.getMessage());
        }
    }

    private static void children() throws IOException, InterruptedException {
        Process child = new ProcessBuilder("/bin/bash", "-c", "read x; echo child $x; exit 5").start();
        child.getOutputStream().write("42\n".getBytes());
        child.getOutputStream().close();
        System.out.print(new String(child.getInputStream().readAllBytes()));
        System.out.println("status " + child.waitFor());
    }

    public static void main(String[] arguments) throws Exception {
        allocate();
        safepoints();
        nulls();
        overflows();
        children();
        ByteBuffer outside = ByteBuffer.allocateDirect(1 << 20);
        for (int i = 0; i < outside.capacity(); i += 4096) {
            outside.putInt(i, i);
        }
        TreeMap<String, Integer> words = new TreeMap<>();
        for (int i = 0; i < 5000; i++) {
            words.merge("word" + i * 7919 % 613, 1, Integer::sum);
        }
        System.out.println("words " + words.size() + " " + words.firstKey() + " " + outside.getInt(409600));
        Runtime.getRuntime().addShutdownHook(new Thread(() -> System.out.println("ends")));
        System.exit(9);
    }
}
