// A host with an event loop: several clients send prompts over sockets, one thread waits for sockets and for the runtime
// alike, and answers go out as they are sampled. No lock, no callback, no second thread in the host.
//
//   c++ -std=c++17 serve.cpp $(pkg-config --cflags --libs rewardrt) -pthread && ./a.out MODEL_FOLDER [DEVICE [CLIENTS]]
//
// The clients are threads of this same program, so that it shows a whole run; a line is a request, "ids…", and what comes
// back is the sampled ids and a final line.
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "rewardrt.h"

namespace {

// A failed call as an exception.
void check(rrt_status status, const rrt_error &err) {
    if (status != RRT_OK) throw std::runtime_error(std::string(rrt_status_name(status)) + ": " + err.text);
}

// The runtime and its model, freed in the right order.
class Engine {
public:
    Engine(const std::string &folder, const std::string &device) {
        rrt_error err{};
        rrt_open_opts open = RRT_OPEN_OPTS_INIT;
        open.device = device.data();
        open.device_len = device.size();
        open.max_jobs = 8; // more are refused, and tried again
        check(rrt_open(&open, &runtime, &err), err);
        rrt_model_opts load = RRT_MODEL_OPTS_INIT;
        load.path = folder.data();
        load.path_len = folder.size();
        const rrt_status loaded = rrt_model_load(runtime, &load, &model, &err);
        if (loaded != RRT_OK) rrt_close(runtime, UINT64_MAX, nullptr);
        check(loaded, err);
    }
    Engine(const Engine &) = delete;
    Engine &operator=(const Engine &) = delete;
    ~Engine() {
        rrt_model_free(model);
        rrt_close(runtime, UINT64_MAX, nullptr);
    }

    // Queues one answer; 0 if the queue is full.
    uint64_t submit(const std::vector<uint32_t> &prompt, uint64_t tag) {
        rrt_error err{};
        const size_t offsets[2] = {0, prompt.size()};
        rrt_sample_req req = RRT_SAMPLE_REQ_INIT;
        req.flags = RRT_SAMPLE_STREAM | RRT_SAMPLE_IGNORE_EOS;
        req.model = model;
        req.prompts = {prompt.data(), offsets, 1};
        req.max_new_tokens = 24;
        req.seed = 7;
        req.user_tag = tag;
        uint64_t job = 0;
        const rrt_status status = rrt_submit_sample(runtime, &req, &job, &err);
        if (status == RRT_E_FULL) return 0;
        check(status, err);
        return job;
    }

    // The sampled ids of a job from `first` on.
    std::vector<uint32_t> ids(uint64_t job, size_t first, size_t count) {
        rrt_error err{};
        std::vector<uint32_t> list(count);
        check(rrt_job_peek(runtime, job, 0, first, list.data(), nullptr, nullptr, count, &count, &err), err);
        list.resize(count);
        return list;
    }

    rrt_runtime *runtime = nullptr;
    rrt_model *model = nullptr;
};

std::string text_of(const std::vector<uint32_t> &ids) {
    std::ostringstream out;
    for (uint32_t id : ids) out << id << ' ';
    return out.str();
}

void send_all(int socket, const std::string &text) {
    for (size_t sent = 0; sent < text.size();) {
        const ssize_t n = send(socket, text.data() + sent, text.size() - sent, MSG_NOSIGNAL);
        if (n <= 0) return; // the client has gone
        sent += static_cast<size_t>(n);
    }
}

// The server's side of a client.
struct Connection {
    int socket;
    std::string input;
    std::vector<uint32_t> waiting; // a prompt that found the queue full
};

class Server {
public:
    explicit Server(Engine &engine) : engine(engine), epoll(epoll_create1(EPOLL_CLOEXEC)) {
        rrt_error err{};
        int32_t fd = -1;
        check(rrt_event_fd(engine.runtime, &fd, &err), err);
        watch(fd);
        runtime_fd = fd;
    }
    Server(const Server &) = delete;
    Server &operator=(const Server &) = delete;
    ~Server() { close(epoll); }

    void add(int socket) {
        connections[socket] = {socket, {}, {}};
        watch(socket);
    }

    // Until the last client has gone.
    void run() {
        while (!connections.empty()) {
            epoll_event ready[16];
            const int count = epoll_wait(epoll, ready, 16, -1);
            for (int i = 0; i < count; i++) {
                if (ready[i].data.fd == runtime_fd) {
                    take_events();
                } else {
                    read_from(ready[i].data.fd);
                }
            }
        }
    }

private:
    void watch(int fd) {
        epoll_event event{};
        event.events = EPOLLIN;
        event.data.fd = fd;
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) != 0) throw std::runtime_error("epoll_ctl");
    }

    void read_from(int socket) {
        char buffer[4096];
        const ssize_t n = read(socket, buffer, sizeof buffer);
        if (n <= 0) {
            connections.erase(socket);
            close(socket);
            return;
        }
        Connection &connection = connections.at(socket);
        connection.input.append(buffer, static_cast<size_t>(n));
        for (size_t end; (end = connection.input.find('\n')) != std::string::npos;) {
            std::istringstream line(connection.input.substr(0, end));
            connection.input.erase(0, end + 1);
            std::vector<uint32_t> prompt;
            for (uint32_t id; line >> id;) prompt.push_back(id);
            begin(connection, prompt);
        }
    }

    void begin(Connection &connection, const std::vector<uint32_t> &prompt) {
        connection.waiting.clear();
        try {
            const uint64_t job = engine.submit(prompt, static_cast<uint64_t>(connection.socket));
            if (job == 0) connection.waiting = prompt;
        } catch (const std::exception &error) {
            send_all(connection.socket, std::string("error ") + error.what() + "\n");
        }
    }

    void take_events() {
        rrt_error err{};
        rrt_event events[64];
        size_t count = 0;
        check(rrt_poll(engine.runtime, events, 64, sizeof events[0], &count, &err), err);
        for (size_t i = 0; i < count; i++) {
            const rrt_event &event = events[i];
            const int socket = static_cast<int>(event.user_tag);
            if (event.kind == RRT_EVENT_CHUNK) {
                send_all(socket, text_of(engine.ids(event.job, event.first, event.count)));
                continue;
            }
            send_all(socket, std::string(rrt_status_name(event.status)) + "\n");
            check(rrt_job_drop(engine.runtime, event.job, &err), err);
            // There is room again.
            for (auto &other : connections) {
                if (!other.second.waiting.empty()) begin(other.second, std::vector<uint32_t>(other.second.waiting));
            }
        }
    }

    Engine &engine;
    int epoll;
    int runtime_fd = -1;
    std::map<int, Connection> connections;
};

// A client: the same prompts one after the other; what comes back for each.
void client(int socket, int rounds, std::vector<std::string> &answers) {
    for (int round = 0; round < rounds; round++) {
        send_all(socket, "5 17 40 " + std::to_string(9 + round) + "\n");
        std::string answer;
        for (char c; read(socket, &c, 1) == 1 && c != '\n';) answer += c;
        answers.push_back(answer);
    }
    close(socket);
}

} // namespace

int main(int argc, char **argv) {
    if (argc < 2) {
        std::fprintf(stderr, "usage: %s MODEL_FOLDER [DEVICE [CLIENTS]]\n", argv[0]);
        return 2;
    }
    const int clients = argc > 3 ? std::atoi(argv[3]) : 12;
    constexpr int rounds = 3;
    try {
        check(rrt_abi_check(RRT_ABI_VERSION), rrt_error{});
        Engine engine(argv[1], argc > 2 ? argv[2] : "auto");
        std::vector<std::vector<std::string>> answers(static_cast<size_t>(clients));
        std::vector<std::thread> threads;
        {
            Server server(engine);
            for (auto &list : answers) {
                int pair[2];
                if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) != 0) return 1;
                server.add(pair[0]);
                threads.emplace_back(client, pair[1], rounds, std::ref(list));
            }
            server.run();
        }
        for (std::thread &thread : threads) thread.join();
        // The same prompt and seed: the same answer for everybody, whoever else was served at the time.
        for (const auto &list : answers) {
            if (list != answers[0] || list.size() != rounds) return 1;
        }
        for (const std::string &answer : answers[0]) std::printf("%s\n", answer.c_str());
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
