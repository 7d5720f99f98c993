-- Answers the server's time in milliseconds, the highest number, and the members above one. KEYS: the watermarks.
-- ARGV: that number, the highest number the caller knows.
local key = KEYS[1]
local time = redis.call('TIME')
local top = redis.pcall('ZRANGE', key, -1, -1, 'WITHSCORES')
if top.err or not top[1] then
    -- Never there, or lost: everything older is dead.
    local number = math.max(time[1] * 1000000 + time[2], tonumber(ARGV[2]) + 1)
    top = {'*', string.format('%.0f', number)}
    redis.call('UNLINK', key)
    redis.call('ZADD', key, top[2], '*')
end
local members = redis.call('ZRANGE', key, '(' .. ARGV[1], '+inf', 'BYSCORE', 'WITHSCORES')
return {time[1] * 1000 + math.floor(time[2] / 1000), top[2], members}
